"""Heads compared on real text: the same trunk, data, loss and step for every kind.

Two comparisons in one table. Equal tokens: every kind on the same trunk, so that one with heavier modules has more parameters.
Equal parameters (names that end in `_matched`): the trunk's feed-forward width makes up for the modules. Each trained model is
then decoded with its own heads (``studies/drafting.py``): what a teacher-forced number forecasts, and what drafts gave.
"""

from matplotlib.figure import Figure

from mtp_dist.config.schema import Study
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.drafting import drafted
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.results import Results
from mtp_dist.studies.text import dataset, learned, tested_on_text

MOST_DEPTHS = 4

COLUMNS = (
    Column("parameters", "parameters, million", 2),
    Column("flops", "MFLOP a token", 2),
    Column("seconds", "seconds a step", 3),
    Column("loss", "held-out main loss", 3, compared=True),
    Column("accuracy", "main accuracy"),
    *(Column(f"accepted_{k}", f"right at depth {k}") for k in range(1, MOST_DEPTHS + 1)),
    Column("gain", "forecast", 2),
    *(Column(f"kept_{k}", f"accepted at depth {k}") for k in range(1, MOST_DEPTHS + 1)),
    Column("forward_tokens", "tokens a forward", 2),
    Column("speedup", "speed over plain", 2),
    Column("same", "same texts", 2),
)


def measure(config: Study, mesh: Mesh) -> Outcome:
    data = dataset(config)
    trained = learned(data, config, mesh)
    outcome = tested_on_text(trained, data, config)
    return Outcome(outcome.numbers | drafted(trained, data, config), outcome.curves)


def notes(config: Study) -> list[str]:
    tokens = config.train.global_batch * config.train.sequence_length * (config.train.steps or 0)
    return [
        f"Each run trained {tokens:,} tokens of Python's standard library; held out: {config.text.sequences} rows of "
        f"{config.train.sequence_length}.",
        "Right at depth k: teacher-forced, share of right targets where the main head and all shallower depths are right. "
        "Forecast: the tokens a forward that greedy decoding would have if it met the same, 1 + the mean number of right drafts.",
        "A target is a token, or with mtp.targets=trunk what the trunk names likeliest, which is easier to forecast than text.",
        f"Accepted at depth k: of the drafts whose earlier ones were accepted, in {config.text.prompts} held-out prompts of "
        f"{config.text.prompt_tokens} tokens continued by {config.text.new_tokens}, one at a time, temperature "
        f"{config.text.temperature:g}. Tokens a forward, and speed over the model's own plain decoding, are of the same texts.",
        "Same texts: share of greedy ones that equal plain decoding's.",
        "Seconds and speed depend on what else the machine does; MFLOP a token (forward and backward) do not.",
    ]


def draw(results: Results) -> Figure:
    chosen = [column for column in COLUMNS if column.key in ("loss", "kept_1", "forward_tokens", "speedup")]
    return bars(results, chosen, "Heads compared: the same trunk, text and loss")


EXPERIMENT = Experiment("What does each kind of head cost, and what does it give?", COLUMNS, measure, draw, notes)
