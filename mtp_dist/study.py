"""An experiment from one command: ``python -m mtp_dist.study experiment=path_star size=laptop``.

Trains every variant of conf/study/<experiment>_<size>.yaml with every seed, one after the other in this process, with the
project's own model, loss and optimizer step. Writes results.md, results.json and a plot into ``run_dir``; started again it
goes on where it was. ``size=paper`` is checked and its cost is printed; it is not run.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.compose import compose
from mtp_dist.config.layout import tokens_per_step, total_steps, world_size
from mtp_dist.config.rules import given
from mtp_dist.config.schema import Study
from mtp_dist.config.study import options
from mtp_dist.errors import UserError
from mtp_dist.launching import stand_alone
from mtp_dist.parallel.budget import flops_per_token
from mtp_dist.studies.experiment import Outcome
from mtp_dist.studies.matching import parameters
from mtp_dist.studies.runs import checked, outcome_of, runs, variants

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.parallel.mesh import Mesh
    from mtp_dist.studies.results import Results

MODULE = "mtp_dist.study"
EXAMPLES = (
    f"python -m {MODULE} experiment=choice_points",
    f"python -m {MODULE} experiment=path_star size=laptop seeds=[1,2,3,4,5] run_dir=runs/path_star",
    f"python -m {MODULE} experiment=path_star only=[none,parallel] train.steps=500",
    f"python -m {MODULE} experiment=heads size=paper",
)


def prepare(base: Study) -> dict[str, Study]:
    """The settings of every variant, checked; a vocabulary that only a dataset knows is left open. Raises UserError."""
    versions.check()
    composed = variants(base)
    for name, config in composed.items():
        given("run_dir", config.run_dir, "runs/NAME")
        if world_size(config.parallel) > 1 and not config.check_only:
            raise UserError(
                f"variant {name}: an experiment runs in one process, and parallel x = {world_size(config.parallel)}; choose "
                "parallel=single"
            )
        checked(config, None)
    return composed


def cost(composed: dict[str, Study]) -> str:
    """What every variant would cost: parameters and operations where the vocabulary is known."""
    lines = [f"{'variant':<24}{'seeds':>6}{'parameters':>14}{'tokens a seed':>16}{'operations a seed':>19}"]
    for name, raw in composed.items():
        config = checked(raw, None)
        tokens = tokens_per_step(config) * total_steps(config)
        known = config.model.vocab_size is not None
        size = f"{parameters(config):,}" if known else "by its text"
        operations = f"{flops_per_token(config) * tokens:.2e}" if known else ""
        lines.append(f"{name:<24}{len(config.seeds):>6}{size:>14}{tokens:>16,}{operations:>19}")
    return "\n".join(lines)


def run(config: Study) -> int:
    """The command. Raises UserError before anything expensive where the settings do not fit."""
    composed = prepare(config)
    print(cost(composed), flush=True)
    if config.check_only:
        print("every variant is valid; check_only=true runs none")
        return 0
    with world_of_one(config) as mesh:
        results = measured(composed, mesh)
    folder = Path(config.run_dir)
    write(results, folder, f"python -m {MODULE} {' '.join(sys.argv[1:])}")
    print((folder / "results.md").read_text(encoding="utf-8"))
    print(f"written to {folder}: results.md, results.json, {config.experiment}.png", flush=True)
    return 0


@contextmanager
def world_of_one(config: Study) -> "Iterator[Mesh]":
    """This process as a whole job: its mesh, until the end of the block."""
    stand_alone(config)
    import torch

    from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
    from mtp_dist.training.trainer import make_deterministic

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = choose_device(config.launch.device)
    if config.train.deterministic:
        make_deterministic(device)
    connect(device, config.parallel.timeout_minutes)
    yield build_mesh(config.parallel, device)
    disconnect()


def measured(composed: dict[str, Study], mesh: "Mesh") -> "Results":
    """Train and measure every run that has no outcome yet."""
    from mtp_dist.studies.catalogue import CATALOGUE
    from mtp_dist.studies.results import Results
    from mtp_dist.studies.text import vocabulary

    ready = {name: checked(config, vocabulary(config)) for name, config in composed.items()}
    experiment = CATALOGUE[next(iter(ready.values())).experiment]
    found: dict[str, list[Outcome]] = {name: [] for name in ready}
    # Seed by seed, so that what an interrupted experiment has is a fair part of the whole.
    each = zip(*(runs(config, name) for name, config in ready.items()), strict=True)
    queue = [pair for seed in each for pair in zip(ready, seed, strict=True)]
    for number, (name, item) in enumerate(queue):
        began = time.monotonic()
        outcome, new = outcome_of(item, lambda config: experiment.measure(config, mesh))
        found[name].append(outcome)
        took = f"{time.monotonic() - began:.0f} s" if new else "there already"
        print(f"run {number + 1} of {len(queue)}: {name}, seed {item.config.seed}: {took}", flush=True)
    return Results(next(iter(ready.values())), found)


def write(results: "Results", folder: Path, command: str) -> None:
    """results.md, results.json and the plot."""
    import matplotlib.pyplot as plt

    from mtp_dist.studies.catalogue import CATALOGUE
    from mtp_dist.studies.results import as_json, markdown

    experiment = CATALOGUE[results.config.experiment]
    folder.mkdir(parents=True, exist_ok=True)
    figure = experiment.draw(results)
    figure.savefig(folder / f"{results.config.experiment}.png", dpi=120)
    plt.close(figure)
    (folder / "results.md").write_text(markdown(experiment, results, command), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(as_json(results, command), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    application(
        "study", Study, run, examples=EXAMPLES, shortcut=lambda typed: compose("study", Study, options(typed))
    )


if __name__ == "__main__":
    main()
