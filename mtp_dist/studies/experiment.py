"""What an experiment is: it trains one variant with one seed and returns numbers; tables and plots are made of those.

To add one: copy a file of this folder, give it an ``Experiment``, a line in ``catalogue.py``, its name in
``config/study.py``, and ``conf/study/NAME_laptop.yaml`` with the variants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtp_dist.config.schema import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mtp_dist.parallel.mesh import Mesh
    from mtp_dist.studies.results import Results


@dataclass(frozen=True)
class Outcome:
    """One variant with one seed. `numbers`: by name, for the table. `curves`: by name, (x, y) for the plot."""

    numbers: dict[str, float]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A number of the table. `compared`: its differences from the first variant's are listed, too."""

    key: str
    title: str
    digits: int = 3
    compared: bool = False


@dataclass(frozen=True)
class Experiment:
    """`question`: one sentence. `measure`: trains and measures one variant with one seed (config.seed). `notes`: what else a
    reader of the results must know, from the settings of the first variant."""

    question: str
    columns: Sequence[Column]
    measure: Callable[[Study, "Mesh"], Outcome]
    draw: Callable[["Results"], "Figure"]
    notes: Callable[[Study], list[str]] = lambda config: []
