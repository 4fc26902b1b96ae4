"""What settings whose null means "derived" come to: pure arithmetic on a configuration."""

import copy
from typing import TypeVar

from mtp_dist.config.layout import processes_per_node, tokens_per_step, total_steps
from mtp_dist.config.schema import ModelConfig, TrainingRun
from mtp_dist.errors import UserError

Training = TypeVar("Training", bound=TrainingRun)


def resolve(config: TrainingRun, vocabulary: int | None) -> TrainingRun:
    """A copy of a valid configuration with derived nulls filled.

    Filled: model.head_dim, model.vocab_size (when a vocabulary is known), train.steps, schedule.decay_tokens (wsd) and
    launch.processes_per_node.
    """
    full = matched(copy.deepcopy(config))
    full.model.head_dim = head_dim(config.model)
    full.model.vocab_size = vocabulary_rows(config.model, vocabulary)
    full.train.steps = total_steps(config)
    if full.schedule.kind == "wsd" and full.schedule.decay_tokens is None:
        full.schedule.decay_tokens = decay_tokens(full)
    full.launch.processes_per_node = processes_per_node(config)
    return full


def decay_tokens(config: TrainingRun) -> int:
    """Tokens of the last decay where none are given: a fifth of the run."""
    return total_steps(config) * tokens_per_step(config) // 5


def vocabulary_rows(model: ModelConfig, vocabulary: int | None) -> int | None:
    """Rows of the embedding: ``model.vocab_size``, or the tokenizer's vocabulary padded; None while neither is known."""
    if model.vocab_size is not None or vocabulary is None:
        return model.vocab_size
    return -(-vocabulary // model.vocab_multiple) * model.vocab_multiple


def matched(config: Training) -> Training:
    """A copy with the blocks taken out of the trunk that `mtp.match_parameters` asks for, which is then done and false."""
    mtp, layers = config.mtp, config.model.layers
    if not mtp.match_parameters:
        return config
    if mtp.kind != "parallel":
        raise UserError(f"mtp.match_parameters=true is for mtp.kind=parallel, not {mtp.kind}; choose mtp.match_parameters=false")
    if layers <= mtp.depth * mtp.blocks:
        raise UserError(
            f"mtp.match_parameters=true takes mtp.depth x mtp.blocks = {mtp.depth} x {mtp.blocks} blocks out of the trunk, which "
            f"has model.layers={layers}; choose model.layers={mtp.depth * mtp.blocks + 1} or more, or mtp.match_parameters=false"
        )
    full = copy.deepcopy(config)
    full.model.layers, full.mtp.match_parameters = layers - mtp.depth * mtp.blocks, False
    return full


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.hidden // model.heads if model.head_dim is None else model.head_dim
