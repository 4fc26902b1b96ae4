"""What the order of the training rows costs: held-out loss after equal numbers of tokens, for several orders of the same rows.

    python -m benchmarks.data_order datasets/python_stdlib

One process trains the same small model (8 layers x 192, two MTP modules, bfloat16) with each order and seed on the same dataset
and schedule, and measures the main head on the same held-out rows along the way. Orders:
  documents        data.mix_tokens=0 and lanes of 8, blocks of 256 documents: rows in the order of the documents
  documents, fine  the same with 32 lanes and blocks of 16 documents
  mixed            the defaults of `data`
  mixed, windows   data.mix_tokens an eighth of the training tokens and small blocks: what the defaults do to a dataset that is
                   far larger than data.mix_tokens
  permutation      the rival: one random permutation of all rows of the split, from stored order, drawn by torch

The last lines compare each order with the permutation, seed by seed: the mean difference of held-out losses, in nats, and
beside it the standard deviation over seeds of the permutation itself.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from mtp_dist.config.command import guarded
from mtp_dist.config.heads import lookahead
from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_training
from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.rows import Rows
from mtp_dist.data.stream import training_stream
from mtp_dist.launching import stand_alone
from mtp_dist.parallel.mesh import Mesh, build_mesh, choose_device, connect, disconnect
from mtp_dist.training.held_out import HeldOut
from mtp_dist.training.learning_rate import learning_rate
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import build

PERMUTATION = "permutation"
BLOCKS = 128
"""Blocks that the training split is cut into for `mixed, windows`."""


def orders(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Name -> settings of `data`."""
    split = dataset.split("train")
    return {
        "documents": {"lanes": 8, "block_samples": 256, "mix_tokens": 0},
        "documents, fine": {"lanes": 32, "block_samples": 16, "mix_tokens": 0},
        "mixed": {},
        "mixed, windows": {"block_samples": -(-split.documents // BLOCKS), "mix_tokens": split.tokens // 8},
        PERMUTATION: {},
    }


def run_of(dataset: Dataset, seed: int, data: dict[str, int], options: argparse.Namespace) -> TrainingRun:
    config = TrainingRun(run_dir="unused", seed=seed)
    config.model.layers, config.model.hidden, config.model.heads, config.model.kv_heads, config.model.mlp = 8, 192, 6, 2, 512
    config.mtp.kind, config.mtp.depth = "sequential", 2
    config.data.path = str(dataset.path)
    for name, value in data.items():
        setattr(config.data, name, value)
    config.optim.lr, config.schedule.warmup_tokens = 2e-3, options.steps * options.batch * options.length // 12
    config.train.global_batch = config.train.micro_batch = options.batch
    config.train.sequence_length, config.train.steps = options.length, options.steps
    validate_training(config, dataset.vocab_size)
    return resolve(config, dataset.vocab_size)


def permuted(dataset: Dataset, config: TrainingRun) -> Callable[[], Batch]:
    """Batches of a random permutation of all rows; epoch after epoch, each with one of its own."""
    rows = Rows(dataset, "train", config.train.sequence_length, lookahead(config.mtp))
    draw, waiting = torch.Generator().manual_seed(config.seed), list[int]()

    def next_batch() -> Batch:
        while len(waiting) < config.train.global_batch:
            waiting.extend(torch.randperm(len(rows), generator=draw).tolist())
        chosen = [waiting.pop(0) for _ in range(config.train.global_batch)]
        parts = [rows.read(row, row + 1) for row in chosen]
        return Batch(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.documents for part in parts]),
            [part.samples[0] for part in parts],
        )

    return next_batch


def losses(dataset: Dataset, name: str, config: TrainingRun, mesh: Mesh, options: argparse.Namespace) -> list[float]:
    """Held-out losses of the main head, in nats a token, after each `every` steps."""
    workload = build(config, mesh)
    if name == PERMUTATION:
        batches = permuted(dataset, config)
    else:
        stream = training_stream(dataset, config, replica=0, replicas=1)
        batches = lambda: stream.next()[0]  # noqa: E731
    held_out = HeldOut(workload, dataset, "validation", options.sequences)
    step_tokens, found = config.train.global_batch * config.train.sequence_length, []
    for step in range(options.steps):
        trained = step * step_tokens
        lr = learning_rate(config.schedule, config.optim.lr, trained + step_tokens, options.steps * step_tokens)
        workload.step(batches(), coefficients(config.mtp, trained), lr)
        if (step + 1) % options.every == 0:
            found.append(held_out.run(config.train.micro_batch, 1).means()["loss"][0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder made by data/build_shards.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=80, help="steps from one measurement to the next")
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--sequences", type=int, default=256, help="held-out rows")
    parser.add_argument("--orders", nargs="+", help="only these")
    options = parser.parse_args()
    dataset = Dataset.open(options.dataset)
    chosen = {name: data for name, data in orders(dataset).items() if not options.orders or name in options.orders}
    first = run_of(dataset, options.seeds[0], {}, options)
    stand_alone(first)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    connect(choose_device("cpu"), timeout_minutes=30)
    mesh = build_mesh(first.parallel, torch.device("cpu"))
    tokens = dataset.split("train").tokens
    print(f"{tokens:,} training tokens; {options.steps} steps of {options.batch * options.length:,} tokens")
    final: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in options.seeds:
        for name, data in chosen.items():
            began = time.perf_counter()
            config = run_of(dataset, seed, data, options)
            found = losses(dataset, name, config, mesh, options)
            final[name].append(found[-1])
            shown = " / ".join(f"{loss:.3f}" for loss in found)
            print(f"seed {seed}  {name:16} {shown}  ({time.perf_counter() - began:.0f} s)", flush=True)
    disconnect()
    rival = final.get(PERMUTATION)
    if not rival or len(rival) < 2:
        return 0
    print(f"\npermutation: {statistics.mean(rival):.3f}, standard deviation over seeds {statistics.stdev(rival):.3f}")
    for name, values in final.items():
        if name != PERMUTATION:
            gaps = [own - other for own, other in zip(values, rival, strict=True)]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
            print(f"{name:16} {statistics.mean(values):.3f}: {statistics.mean(gaps):+.3f} +- {error:.3f} (standard error) of it")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
