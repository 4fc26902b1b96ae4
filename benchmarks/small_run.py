"""The training run that benchmarks of a step measure: random tokens, one document a row, float32, no clipping."""

import argparse

import torch

from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_training
from mtp_dist.data.batch import Batch


def small_run(
    *, layers: int, hidden: int, vocabulary: int, depth: int, sequence: int, micro_batch: int, micro_batches: int
) -> TrainingRun:
    """A valid run in one process; `finish` it after other settings are changed."""
    config = TrainingRun(run_dir="unused")
    config.model.layers, config.model.hidden, config.model.vocab_size = layers, hidden, vocabulary
    config.model.heads, config.model.kv_heads, config.model.mlp = 8, 4, 11 * hidden // 4
    config.model.document_mask = False
    config.mtp.depth, config.mtp.kind = depth, "sequential" if depth else "none"
    config.zero.stage, config.optim.clip = 0, 0.0
    config.data.lanes = 1
    config.train.micro_batch, config.train.global_batch = micro_batch, micro_batch * micro_batches
    config.train.sequence_length, config.train.dtype, config.train.steps = sequence, "float32", 1
    return config


def add_model_options(parser: argparse.ArgumentParser, *, layers: int = 12, micro_batch: int = 2, micro_batches: int = 8) -> None:
    """Options of the command line for what `run_of` reads."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=micro_batch)
    parser.add_argument("--micro-batches", type=int, default=micro_batches)


def run_of(options: argparse.Namespace, *, depth: int | None = None) -> TrainingRun:
    """``small_run`` as the command line asks, but for another `depth`."""
    names = ("layers", "hidden", "vocabulary", "depth", "sequence", "micro_batch", "micro_batches")
    asked = {name: getattr(options, name) for name in names}
    return small_run(**asked | ({} if depth is None else {"depth": depth}))


def finish(config: TrainingRun) -> TrainingRun:
    """Checked, with derived settings filled."""
    validate_training(config, None)
    return resolve(config, None)


def random_batch(config: TrainingRun) -> Batch:
    """The same rows on every rank."""
    assert config.model.vocab_size is not None
    shape = (config.train.global_batch, config.train.sequence_length + 1 + config.mtp.depth)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(7))
    return Batch(tokens, torch.zeros(shape, dtype=torch.int32), [[] for _ in range(len(tokens))])
