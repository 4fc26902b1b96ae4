"""The pipeline bubble of a real step against the same schedule simulated with that step's own forward, backward and weight times.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.bubble

The rival is ``mtp_dist.parallel.simulation``, which knows computation alone: what the real bubble has beyond the simulated one
is messages, waiting for the operating system, and passes that do not always take equally long. One thread a process, float32.
The simulation takes, for each chunk and kind of pass, the mean time within that step.
"""

import argparse
import copy
import statistics
from collections import defaultdict

import torch
import torch.distributed as dist

from benchmarks.small_run import add_model_options, finish, random_batch, run_of
from benchmarks.timing import median_interval
from mtp_dist.config.layout import chunks, micro_batches
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_training
from mtp_dist.data.batch import Batch
from mtp_dist.errors import UserError
from mtp_dist.parallel.cost import Work
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.parallel.passes import orders
from mtp_dist.parallel.simulation import simulate
from mtp_dist.parallel.timeline import Span, Timeline, bubbles
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build

WARM_UP = 2


def recorded_steps(config: TrainingRun, batch: Batch, rounds: int) -> list[list[list[Span]]]:
    """For each round the spans of each rank."""
    device = choose_device("auto")
    mesh = build_mesh(config.parallel, device)
    workload, parts = build(config, mesh), coefficients(config.mtp, 0)
    own = batch if mesh.is_reader else None
    for _ in range(WARM_UP):
        workload.step(own, parts, config.optim.lr)
    found = []
    for _ in range(rounds):
        dist.barrier()
        timeline = Timeline(device)
        workload.record(timeline)
        workload.step(own, parts, config.optim.lr)
        workload.record(None)
        ranks: list[list[Span]] = [[]] * dist.get_world_size()
        dist.all_gather_object(ranks, timeline.spans())
        found.append(ranks)
    return found


def mean_works(ranks: list[list[Span]], count: int) -> list[Work]:
    """Mean nanoseconds of each chunk's passes. Where a schedule runs both gradients at once they are in `backward`."""
    times: dict[tuple[int, str], list[int]] = defaultdict(list)
    for spans in ranks:
        for one in spans:
            if one.chunk is not None and one.kind in "FBW":
                times[one.chunk, one.kind].append(one.end - one.begin)
    return [Work(*(statistics.fmean(times[number, kind] or [0]) for kind in "FBW")) for number in range(count)]


def compare_bubbles(config: TrainingRun, batch: Batch, rounds: int) -> tuple[list[float], list[float]]:
    """Measured and simulated bubble of each round."""
    parallel, count = config.parallel, chunks(config.parallel)
    order = orders(parallel, micro_batches(config))
    measured, simulated = [], []
    for ranks in recorded_steps(config, batch, rounds):
        measured.append(statistics.fmean(bubbles(ranks)))
        simulated.append(simulate(parallel, order, mean_works(ranks, count)).bubble)
    return measured, simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect(choose_device("auto"), timeout_minutes=5)
    base = run_of(options)
    base.parallel.pipeline = dist.get_world_size()
    for schedule in ("1f1b", "interleaved", "zbv", "dualpipev"):
        config = copy.deepcopy(base)
        config.parallel.schedule = schedule
        try:
            validate_training(config, None)
        except UserError as error:
            say(f"{schedule}: left out: {error}")
            continue
        config = finish(config)
        measured, simulated = compare_bubbles(config, random_batch(config), options.rounds)
        points = median_interval([100 * (real - played) for real, played in zip(measured, simulated, strict=True)])
        say(
            f"{schedule:12s} bubble measured {statistics.median(measured):.1%}, simulated {statistics.median(simulated):.1%}; "
            "difference {:.1f} points (95 % interval {:.1f} to {:.1f})".format(*points)
        )
        ratio = median_interval([(1 - real) / (1 - played) for real, played in zip(measured, simulated, strict=True)])
        say(f"ratio: {schedule} share of time in use, measured / simulated = {{:.3f}} ({{:.3f}} to {{:.3f}})".format(*ratio))
    disconnect()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
