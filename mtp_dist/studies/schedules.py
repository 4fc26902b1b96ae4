"""What lambda, its schedule, the number of depths and the tokenizer do to the main loss and to acceptance, on real text.

Bytes and byte pairs are compared by bits a byte of text, and by bytes a forward pass: their tokens are not the same size.
Both train the same number of tokens, so byte models see less text.
"""

from matplotlib.figure import Figure

from mtp_dist.config.schema import Study
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment
from mtp_dist.studies.results import Results
from mtp_dist.studies.text import trained_on_text

COLUMNS = (
    Column("bits", "held-out bits a byte", 3, compared=True),
    Column("loss", "held-out main loss", 3),
    *(Column(f"accepted_{k}", f"accepted at depth {k}") for k in range(1, 5)),
    Column("gain", "tokens a forward", 2),
    Column("gain_bytes", "bytes a forward", 2),
    Column("flops", "MFLOP a token", 2),
)


def notes(config: Study) -> list[str]:
    tokens = config.train.global_batch * config.train.sequence_length * (config.train.steps or 0)
    return [
        f"Each run trained {tokens:,} tokens; held out: {config.text.sequences} rows of {config.train.sequence_length} tokens.",
        "Lambda is spread over the depths (normalize: mean); variants are sequential heads unless they say otherwise.",
        "Accepted: teacher-forced, as in experiment=heads.",
    ]


def draw(results: Results) -> Figure:
    chosen = [column for column in COLUMNS if column.key in ("bits", "accepted_1", "gain_bytes")]
    return bars(results, chosen, "Lambda, depths and tokenizer")


EXPERIMENT = Experiment("What do lambda, depth and tokenizer change?", COLUMNS, trained_on_text, draw, notes)
