"""Step time of this project's V placement against DeepSpeed's own pipelines, on the same model with MTP, batch and micro-batches.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.pipeline_step

Two processes of one thread each, float32, no ZeRO on either side. Contestants, which take turns in the same two processes:
  balanced, uniform    this project, zero-bubble V, with parallel.placement=balanced (by the costs that are measured first, as
                       ``plan measure=true`` does) and =uniform
  default              DeepSpeed's PipelineModule (1F1B), partitioned as it does by default: by parameters
  best                 the same, cut where it is fastest (every cut in the trunk's second half is tried)
  dualpipev            DeepSpeed's DualPipeVModule, cut as `balanced` is
Before anything is timed all must agree on the losses of three steps. A ratio is the rival's time over that of `balanced`.
"""

import argparse
import copy
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from benchmarks.small_run import add_model_options, finish, random_batch, run_of
from benchmarks.timing import compare, seconds, take_turns
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.batch import Batch
from mtp_dist.parallel.measurement import measured_costs
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.parallel.placement import layers_of_chunks
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build

TOLERANCE = 1e-4
"""Largest difference of losses that may come from the order of sums."""
CHECKED_STEPS = 3


@dataclass
class Contestant:
    name: str
    partition: list[int]
    step: Callable[[], float]


def own(config: TrainingRun, batch: Batch, placement: str) -> Contestant:
    """This project, a V schedule."""
    config = copy.deepcopy(config)
    config.parallel.placement = placement
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload, parts = build(config, mesh), coefficients(config.mtp, 0)

    def step() -> float:
        return workload.step(batch if mesh.is_reader else None, parts, config.optim.lr)[0].loss

    return Contestant(placement, [len(layers) for layers in layers_of_chunks(config)], step)


def rival(config: TrainingRun, batch: Batch, name: str, boundaries: list[int] | None, *, v: bool = False) -> Contestant:
    """DeepSpeed."""
    from benchmarks.deepspeed_pipeline import Rival

    made = Rival(config, batch, boundaries, v=v)
    return Contestant(name, made.boundaries, made.step)


def together(step: Callable[[], float]) -> Callable[[], float]:
    """A step that both processes begin and end together, so that each sees the time of the slower one."""

    def run() -> float:
        dist.barrier()
        loss = step()
        dist.barrier()
        return loss

    return run


def best_cut(config: TrainingRun, batch: Batch) -> tuple[int, dict[int, float]]:
    """Trunk layers before the fastest cut of 1F1B, and the seconds of each that was tried (the least of three steps)."""
    from benchmarks.deepspeed_pipeline import cut_after

    tried = {}
    for layers in range(config.model.layers // 2, config.model.layers + 1):
        contestant = rival(config, batch, "try", cut_after(config, layers))
        step = together(contestant.step)
        step()
        tried[layers] = min(seconds(step) for _ in range(3))
        del contestant, step
        gc.collect()
    # Both processes must choose alike.
    chosen = [min(tried, key=lambda layers: tried[layers])]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0], tried


def check(contestants: list[Contestant]) -> None:
    """All compute the same losses, for CHECKED_STEPS steps."""
    losses = {c.name: [c.step() for _ in range(CHECKED_STEPS)] for c in contestants}
    say("losses of the first steps:")
    for name, values in losses.items():
        say(f"  {name:10s} " + " ".join(f"{value:.6f}" for value in values))
    first = next(iter(losses.values()))
    worst = max(abs(a - b) for values in losses.values() for a, b in zip(values, first, strict=True))
    say(f"largest difference: {worst:.2e}")
    if not worst <= TOLERANCE:
        sys.exit(f"not the same computation: losses differ by {worst:.2e}, more than {TOLERANCE}")


def shared_costs(config: TrainingRun) -> list[float]:
    """Measured on both processes at once, as they will work, and rank 0's taken by both."""
    found = measured_costs(config, torch.device("cpu"))
    costs = [[part for work in found for part in work]]
    dist.broadcast_object_list(costs, src=0)
    say(f"the heads weigh {found.tail_in_layers:.2f} layers")
    return costs[0]


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--schedule", choices=("zbv", "dualpipev"), default="zbv", help="of this project's two")
    parser.add_argument("--check", action="store_true", help="only check that all compute the same losses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=5)
    config = run_of(options)
    config.parallel.pipeline, config.parallel.schedule = 2, options.schedule
    config = finish(config)
    if not options.check:
        config.parallel.costs = shared_costs(config)
    run(config, random_batch(config), options.rounds, only_check=options.check)
    disconnect()


def run(config: TrainingRun, batch: Batch, rounds: int, *, only_check: bool) -> None:
    """Check, and unless `only_check` measure."""
    from benchmarks.deepspeed_pipeline import cut_after

    cut, tried = (config.model.layers // 2, {}) if only_check else best_cut(config, batch)
    for layers, time in tried.items():
        say(f"1F1B cut after {layers} trunk layers: {time:.3f} s")
    sizes = [len(layers) for layers in layers_of_chunks(config)]
    contestants = [
        own(config, batch, "balanced"),
        own(config, batch, "uniform"),
        rival(config, batch, "default", None),
        rival(config, batch, "best", cut_after(config, cut)),
        rival(config, batch, "dualpipev", cut_after(config, *accumulate(sizes[:-1])), v=True),
    ]
    for c in contestants:
        say(f"{c.name:10s} {'trunk layers of chunks' if c.name in ('balanced', 'uniform') else 'stage boundaries'} {c.partition}")
    check(contestants)
    if only_check:
        return
    times = take_turns({c.name: together(c.step) for c in contestants}, rounds)
    for name, values in times.items():
        say(f"{name:10s} median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}")
    for name in ("uniform", "dualpipev", "default"):
        say(f"{name} / balanced: {compare(times[name], times['balanced'])}")
    say(f"ratio: DeepSpeed 1F1B at its best cut / balanced V = {compare(times['best'], times['balanced'])}")


if __name__ == "__main__":
    main()
