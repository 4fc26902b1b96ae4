"""Step time, use of the device's peak (MFU), and memory, layout by layout, on one or more GPUs (or, to see that it runs, on CPU).

    torchrun --standalone --nproc-per-node 8 -m benchmarks.gpu --settings "model=1b train.micro_batch=2" \\
        --layout "parallel.data=8" --layout "parallel.pipeline=2 parallel.data=4 parallel.schedule=zbv" \\
        --layout "parallel.tensor=2 parallel.data=4 parallel.sequence_parallel=true zero.stage=1"

`--settings` holds for all, each `--layout` is one contestant whose world must be that of torchrun; without any it is data
parallelism, and on a GPU the same with compiled blocks. Random tokens of several documents a row. The operations of MFU are
those of ``mtp_dist.plan`` (forward and backward, no recomputation); the peak is that of dense bfloat16 products. The head's
memory is that of ``head_loss`` alone, above its inputs. A ratio is a layout's time over that of the first one.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from benchmarks.timing import seconds
from mtp_dist.config.compose import compose
from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_training
from mtp_dist.data.batch import Batch
from mtp_dist.model.head_loss import head_loss
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.parallel.budget import flops_per_token
from mtp_dist.parallel.drawing import placement_drawing
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build

PEAKS = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "L40S": 362.0, "B200": 2250.0, "MI300X": 1307.4}
"""Makers' dense bfloat16 peaks, in 10^12 operations a second; the SXM form where there are several."""
GIB = 2**30


@dataclass
class Result:
    seconds: list[float]
    tokens: int
    operations: float
    memory: float
    """GiB of the fullest rank: on CUDA the peak allocated, else resident."""


def batch_of(config: TrainingRun, rows: int) -> Batch:
    """Random tokens, a new document about every quarter of a row."""
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(7)
    shape = (rows, config.train.sequence_length + 1 + config.mtp.depth)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    starts = torch.rand(shape, generator=generator) < 4 / config.train.sequence_length
    return Batch(tokens, starts.cumsum(1).int(), [[] for _ in range(rows)])


def configuration(settings: list[str]) -> TrainingRun:
    """Checked; as many micro-batches as the pipeline has chunks twice over, unless train.global_batch is given."""
    given = ["run_dir=unused", "train.steps=1", "data.lanes=1", *settings]
    config = compose("train", TrainingRun, given)
    config.data.lanes = config.parallel.data
    if not any(setting.startswith("train.global_batch=") for setting in settings):
        count = max(8, 4 * config.parallel.pipeline) if config.parallel.pipeline > 1 else 8
        config.train.global_batch = config.train.micro_batch * config.parallel.data * count
    validate_training(config, config.model.vocab_size or 32768)
    return resolve(config, config.model.vocab_size or 32768)


def measure(config: TrainingRun, device: torch.device, rounds: int) -> Result:
    """Steps of one layout in these processes."""
    mesh = build_mesh(config.parallel, device)
    workload = build(config, mesh, range(config.mtp.draft_vocabulary or 0))  # which tokens makes no difference to the time
    parts = coefficients(config.mtp, 0)
    say(placement_drawing(config, workload.attention))
    batch = batch_of(config, config.train.global_batch // config.parallel.data) if mesh.is_reader else None

    def step() -> None:
        # It reads the loss, which waits for the device.
        workload.step(batch, parts, config.optim.lr)
        dist.barrier()

    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(step) for _ in range(rounds)]
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    fullest = torch.tensor([held / GIB], dtype=torch.float64)
    dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=mesh.control)
    tokens = config.train.global_batch * config.train.sequence_length
    return Result(times, tokens, flops_per_token(config) * tokens, fullest.item())


def head_memory(config: TrainingRun, device: torch.device) -> list[float]:
    """GiB that the loss of D = 0 .. 4 takes above its states and the weight, on CUDA."""
    assert config.model.vocab_size is not None
    dtype, found = getattr(torch, config.train.dtype), []
    for depth in range(5):
        shape = (config.train.micro_batch, config.train.sequence_length, config.model.hidden)
        weight = parameter((config.model.vocab_size, config.model.hidden), split=0, std=None, group=ALONE)
        weight.data = torch.randn(weight.shape, device=device, dtype=dtype) * 0.02
        states = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(1 + depth)]
        wanted = torch.randint(0, config.model.vocab_size, (*shape[:2], 1 + depth), device=device)
        scale = torch.ones(shape[0], 1 + depth, device=device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        head_loss(states, weight, wanted, scale, ALONE, None)[0].backward()
        torch.cuda.synchronize()
        found.append((torch.cuda.max_memory_allocated() - before) / GIB)
    return found


def attempt(layout: str, run: Callable[[], Result]) -> Result | None:
    """None where the device's memory does not suffice."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        say(f"{layout}: out of memory")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="model=125m model.vocab_size=32768 train.sequence_length=1024 train.micro_batch=4")
    parser.add_argument("--layout", action="append", help="settings of one layout, in one argument")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak", type=float, help="10^12 operations a second of one device, where it is not known by name")
    options = parser.parse_args()
    device = choose_device("auto")
    connect(device, timeout_minutes=5)
    world = dist.get_world_size()
    layouts = options.layout or [f"parallel.data={world}"]
    if not options.layout and device.type == "cuda":
        layouts.append(f"parallel.data={world} train.compile=true")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = options.peak or next((value for part, value in PEAKS.items() if part in name), None)
    say(f"{world} x {name}, torch {torch.__version__}; {options.settings}")
    first: Result | None = None
    for layout in layouts:
        config = configuration([*options.settings.split(), *layout.split()])
        say(f"\n{layout}")
        result = attempt(layout, lambda config=config: measure(config, device, options.rounds))  # type: ignore[misc]
        if result is None:
            continue
        middle = statistics.median(result.seconds)
        share = f", MFU {result.operations / middle / world / peak / 1e12:.1%} of {peak:g} TFLOP/s" if peak else ""
        say(
            f"step {middle:.4f} s ({min(result.seconds):.4f} to {max(result.seconds):.4f}), "
            f"{result.tokens / middle:,.0f} tokens/s{share}, {result.memory:.2f} GiB on the fullest rank"
        )
        first = first or result
        say(f"ratio: {layout} / {layouts[0]} = {middle / statistics.median(first.seconds):.3f}")
    if device.type == "cuda":
        each = head_memory(configuration([*options.settings.split(), *layouts[0].split()]), device)
        say("\nhead memory of D = 0 .. 4: " + ", ".join(f"{value:.3f}" for value in each) + " GiB")
        say(f"ratio: head memory of D = 4 / D = 0 = {each[4] / each[0]:.3f}")
    disconnect()


if __name__ == "__main__":
    main()
