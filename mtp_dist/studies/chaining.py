"""What drafts gain where heads are trained as they draft: on their own predictions (`mtp.scheduled_sampling`); and what they gain
from vocabulary matrices of their own.

Trained and measured as in ``studies/heads.py``. A draft of depth k >= 2 reads the draft before it, where teacher forcing has the
true token: the two differ only where that draft is wrong, and then nothing behind it is accepted.
"""

from matplotlib.figure import Figure

from mtp_dist.studies import heads
from mtp_dist.studies.drawing import bars
from mtp_dist.studies.experiment import Column, Experiment
from mtp_dist.studies.results import Results

MOST_DEPTHS = 3

COLUMNS = (
    Column("parameters", "parameters, million", 2),
    Column("flops", "MFLOP a token", 2),
    Column("loss", "held-out main loss", 3, compared=True),
    *(Column(f"accepted_{k}", f"right at depth {k}") for k in range(1, MOST_DEPTHS + 1)),
    *(Column(f"kept_{k}", f"accepted at depth {k}") for k in range(1, MOST_DEPTHS + 1)),
    Column("forward_tokens", "tokens a forward", 2, compared=True),
    Column("same", "same texts", 2),
)


def draw(results: Results) -> Figure:
    chosen = [column for column in COLUMNS if column.key in ("loss", "kept_1", "kept_2", "forward_tokens")]
    return bars(results, chosen, "Heads trained on true tokens, on their own predictions, with their own matrices")


EXPERIMENT = Experiment(
    "Do heads draft better if they are trained on their own predictions, or with vocabulary matrices of their own?",
    COLUMNS,
    heads.measure,
    draw,
    heads.notes,
)
