"""Heads compared on real text: the same trunk, data, loss and step for every kind.

Two comparisons in one table. Equal tokens: every kind on the same trunk, so that one with heavier modules has more
parameters. Equal parameters (names that end in `_matched`): the trunk's feed-forward width makes up for the modules.
"""

from matplotlib.figure import Figure

from mtp_dist.config.schema import Study
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment
from mtp_dist.studies.results import Results
from mtp_dist.studies.text import trained_on_text

MOST_DEPTHS = 4

COLUMNS = (
    Column("parameters", "parameters, million", 2),
    Column("flops", "MFLOP a token", 2),
    Column("seconds", "seconds a step", 3),
    Column("loss", "held-out main loss", 3, compared=True),
    Column("accuracy", "main accuracy"),
    *(Column(f"accepted_{k}", f"accepted at depth {k}") for k in range(1, MOST_DEPTHS + 1)),
    Column("gain", "tokens a forward", 2),
)


def notes(config: Study) -> list[str]:
    tokens = config.train.global_batch * config.train.sequence_length * (config.train.steps or 0)
    return [
        f"Each run trained {tokens:,} tokens of Python's standard library; held out: {config.text.sequences} rows of "
        f"{config.train.sequence_length}.",
        "Accepted at depth k: teacher-forced, share of right targets where the main head and all shallower depths are right.",
        "Tokens a forward: what greedy decoding would gain if it met the same, 1 + the mean number of right drafts.",
        "Seconds a step depend on what else the machine does; MFLOP a token (forward and backward) do not.",
    ]


def draw(results: Results) -> Figure:
    chosen = [column for column in COLUMNS if column.key in ("loss", "accepted_1", "accepted_2", "gain")]
    return bars(results, chosen, "Heads compared: the same trunk, text and loss")


EXPERIMENT = Experiment("What does each kind of head cost, and what does it give?", COLUMNS, trained_on_text, draw, notes)
