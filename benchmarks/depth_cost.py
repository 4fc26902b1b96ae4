"""What MTP costs beyond its floating-point operations: step time with D = 1 (or --depth) over that with D = 0, divided by the
ratio of operations a token (``mtp_dist.parallel.budget``).

    torchrun --standalone --nproc-per-node 1 -m benchmarks.depth_cost

The rival is the same model without MTP, under the same trainer step (forward, backward, AdamW), in the same process, in turns.
float32, one thread, no ZeRO. 1.0: the depth runs as efficiently as the rest.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.small_run import add_model_options, finish, random_batch, run_of
from benchmarks.timing import median_interval, take_turns
from mtp_dist.parallel.budget import flops_per_token
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build


def stepper(options: argparse.Namespace, depth: int) -> tuple[Callable[[], float], int]:
    """A step that returns its loss, and operations a token."""
    config = finish(run_of(options, depth=depth))
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload, parts, batch = build(config, mesh), coefficients(config.mtp, 0), random_batch(config)
    return lambda: workload.step(batch, parts, config.optim.lr)[0].loss, flops_per_token(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, layers=8, micro_batch=4, micro_batches=4)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=5)
    without, base = stepper(options, 0)
    with_heads, more = stepper(options, options.depth)
    with_name = f"D = {options.depth}"
    times = take_turns({"D = 0": without, with_name: with_heads}, options.rounds)
    for name, values in times.items():
        print(f"{name} median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}")
    print(f"operations a token: {base / 1e6:.2f} M, {more / 1e6:.2f} M, ratio {more / base:.4f}")
    ratios = [heads / none for heads, none in zip(times[with_name], times["D = 0"], strict=True)]
    print("time ratio: {:.4f} (95 % interval {:.4f} to {:.4f})".format(*median_interval(ratios)))
    middle, low, high = median_interval([ratio * base / more for ratio in ratios])
    print(f"ratio: time ratio / operations ratio = {middle:.3f} (95 % interval {low:.3f} to {high:.3f}, {options.rounds} pairs)")
    disconnect()


if __name__ == "__main__":
    main()
