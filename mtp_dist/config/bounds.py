"""The bounds of every number setting: a slip is an error, and not a run that hangs, fails or learns nothing.

They are wide: a bound refuses what no machine can do (10^9 layers) or what no arithmetic carries (a learning rate of 1e-300 is
0 in float32), not what is unusual. Each number of a list is held to them. Rules between settings are in ``validation.py``.
"""

from functools import cache
from typing import Any, get_args

from mtp_dist.config.numbers import Bounds, fault, numbers_in, shown, takes_number
from mtp_dist.errors import UserError

MOST_TOKENS = 10**18
"""Of a run: what a 64-bit counter holds, with room."""
SEED = Bounds(0, 2**63 - 1)
_ROWS = Bounds(1, 10**6)
_COUNT = Bounds(0, 10**6)
_STEPS = Bounds(0, 10**9)
_MINUTES = Bounds(0.001, 10**7, zero=True)
_THREADS = Bounds(0, 4096)
_WEIGHT = Bounds(1e-12, 10**6, zero=True)
TEMPERATURE = Bounds(0.0001, 100, zero=True)
"""Logits are divided by it in float32."""
TOP_P = Bounds(1e-6, 1)
NEW_TOKENS = Bounds(1, 10**6)
TOP_K = Bounds(0, 2**24)

BOUNDS: dict[str, Bounds] = {
    "seed": SEED,
    "model.vocab_size": Bounds(1, 2**24, example=32000),
    "model.vocab_multiple": Bounds(1, 10**6),
    "model.layers": Bounds(1, 10_000),
    "model.hidden": Bounds(1, 2**20),
    "model.heads": Bounds(1, 2**16),
    "model.kv_heads": Bounds(1, 2**16),
    "model.head_dim": Bounds(1, 2**14, example=64),
    "model.mlp": Bounds(1, 2**24),
    "model.norm_eps": Bounds(1e-20, 1),
    "model.rope_theta": Bounds(1e-3, 1e15),
    "model.init_std": Bounds(1e-8, 100),
    "mtp.depth": Bounds(0, 1024),
    "mtp.stride": Bounds(1, 10**6),
    "mtp.main_loss_weight": _WEIGHT,
    "mtp.main_loss_weight_points": Bounds(0, MOST_TOKENS),
    "mtp.scheduled_sampling": Bounds(0, 1),
    "mtp.scheduled_sampling_points": Bounds(0, MOST_TOKENS),
    "mtp.loss_weight": _WEIGHT,
    "mtp.loss_weight_points": Bounds(0, MOST_TOKENS),
    "mtp.depth_weights": _WEIGHT,
    "mtp.decay": Bounds(1e-6, 1000),
    "mtp.curriculum": Bounds(0, MOST_TOKENS),
    "mtp.blocks": Bounds(1, 1024),
    "mtp.adversarial": _WEIGHT,
    "mtp.draft_vocabulary": Bounds(1, 2**24, example=32000),
    "mtp.window": Bounds(2, 64),
    "mtp.taps": Bounds(0, 10_000),
    "mtp.cross_entropy_weight": _WEIGHT,
    "parallel.pipeline": Bounds(1, 10_000),
    "parallel.tensor": Bounds(1, 2**16),
    "parallel.data": Bounds(1, 10**6),
    "parallel.interleave": Bounds(1, 10_000),
    "parallel.costs": Bounds(0, 1e12),
    "parallel.timeout_minutes": Bounds(0.001, 10**5),
    "zero.stage": Bounds(0, 3),
    "zero.reduce_bucket_size": Bounds(1, 10**12),
    "zero.allgather_bucket_size": Bounds(1, 10**12),
    "data.lanes": _ROWS,
    "data.block_samples": Bounds(1, 10**7),
    "data.mix_tokens": Bounds(0, 10**12),
    "data.prefetch": Bounds(0, 1000),
    "tokenizer.vocab_size": Bounds(1, 2**24),
    "tokenizer.train_bytes": Bounds(1, 10**12),
    "optim.lr": Bounds(1e-12, 1000),
    "optim.beta1": Bounds(0, 1, below=True),
    "optim.beta2": Bounds(0, 1, below=True),
    "optim.eps": Bounds(1e-30, 1),
    "optim.weight_decay": Bounds(1e-12, 1000, zero=True),
    "optim.clip": Bounds(1e-9, 1e12, zero=True),
    "optim.head_lr_ratio": Bounds(1e-6, 10**6),
    "schedule.warmup_tokens": Bounds(0, MOST_TOKENS),
    "schedule.decay_tokens": Bounds(1, MOST_TOKENS, example=10**9),
    "schedule.min_ratio": Bounds(0, 1),
    "train.global_batch": _ROWS,
    "train.micro_batch": _ROWS,
    "train.sequence_length": Bounds(1, 2**24),
    "train.steps": Bounds(1, 10**9, example=1000),
    "train.tokens": Bounds(1, MOST_TOKENS, example=2 * 10**9),
    "train.nonfinite_limit": Bounds(1, 10**9),
    "train.log_every_steps": Bounds(1, 10**9),
    "train.log_every_minutes": _MINUTES,
    "validation.every_steps": _STEPS,
    "validation.every_minutes": _MINUTES,
    "validation.sequences": Bounds(1, 10**7),
    "validation.prompt_tokens": NEW_TOKENS,
    "checkpoint.every_steps": _STEPS,
    "checkpoint.every_minutes": _MINUTES,
    "checkpoint.keep_last": _COUNT,
    "checkpoint.keep_every_steps": _STEPS,
    "launch.nodes": Bounds(1, 10**5),
    "launch.processes_per_node": Bounds(1, 4096, example=8),
    "launch.threads": _THREADS,
    "launch.master_port": Bounds(0, 65535),
    "launch.node_rank": Bounds(0, 10**5),
    "launch.gpus_per_node": Bounds(0, 1024, example=8),
    "launch.cpus_per_task": Bounds(1, 4096, example=8),
    "launch.signal_seconds": Bounds(0, 65535),  # Slurm's own limit
    "launch.max_restarts": _COUNT,
    "world_memory_gib": Bounds(1e-6, 10**6),
    "temperatures": TEMPERATURE,
    "sequences": Bounds(1, 10**9),
    "micro_batch": _ROWS,
    "programs.samples": Bounds(1, 10**5),
    "programs.k": Bounds(1, 10**5),
    "programs.seconds": Bounds(0.01, 10**5),
    "programs.memory_mb": Bounds(1, 10**7),
    "decode.max_new_tokens": NEW_TOKENS,
    "decode.draft": Bounds(1, 1024, example=4),
    "decode.tree_nodes": Bounds(1, 10_000),
    "decode.tree_width": Bounds(1, 10_000),
    "decode.tree_shape": Bounds(0, 2**24),
    "decode.ngram": Bounds(1, 10_000),
    "decode.typical_epsilon": Bounds(0, 1),
    "decode.typical_delta": Bounds(0, 10**6),
    "decode.temperature": TEMPERATURE,
    "decode.top_k": TOP_K,
    "decode.top_p": TOP_P,
    "decode.batch": Bounds(1, 10_000),
    "decode.threads": _THREADS,
    "port": Bounds(0, 65535),
    "longest": Bounds(2, 2**24, example=4096),
    "waiting": Bounds(1, 10**6),
    "seconds": Bounds(0.001, 10**6),
    "body_kib": Bounds(1, 10**6),
    "connections": Bounds(1, 10**6),
    "header_seconds": Bounds(0.001, 10**6),
    "body_seconds": Bounds(0.001, 10**6),
    "idle_seconds": Bounds(0.001, 10**6),
    "write_seconds": Bounds(0.001, 10**6),
    "patience": Bounds(0, 10**6),
    "shard_gb": Bounds(1e-6, 10**4),
    "validation_share": Bounds(0, 1, below=True),
    "shard_mb": Bounds(1e-6, 10**6),
    "limit_mb": Bounds(1e-6, 10**9, zero=True),
    "workers": _THREADS,
    "seeds": SEED,
    "parameters": Bounds(1, 10**15, example=5 * 10**6),
    "choice_points.choice": _COUNT,
    "choice_points.branches": Bounds(2, 10**5),
    "choice_points.rows": _ROWS,
    "path_star.degree": Bounds(2, 10**5),
    "path_star.length": Bounds(1, 10**5),
    "path_star.nodes": Bounds(1, 2**24),
    "path_star.test_rows": _ROWS,
    "induction.names": Bounds(2, 2**20),
    "induction.words": Bounds(2, 10_000),  # their table has this many squared entries
    "induction.people": Bounds(1, 10**5),
    "induction.mentions": Bounds(1, 10**5),
    "induction.test_rows": _ROWS,
    "polynomials.modulus": Bounds(2, 10_007),
    "polynomials.coefficients": Bounds(1, 10_000),
    "polynomials.operations": Bounds(1, 1000),
    "polynomials.beyond": Bounds(1, 1000),
    "polynomials.test_rows": _ROWS,
    "text.limit_mb": Bounds(1e-6, 10**9, zero=True),
    "text.sequences": Bounds(1, 10**7),
    "text.prompts": Bounds(1, 10**6),
    "text.prompt_tokens": NEW_TOKENS,
    "text.new_tokens": NEW_TOKENS,
    "text.temperature": TEMPERATURE,
}


@cache
def bounds_of(key: str, kind: Any) -> Bounds | None:
    """The bounds of a setting of that type; None for one that is no number. KeyError for a number that ``BOUNDS`` lacks."""
    return BOUNDS[key] if takes_number(kind) and not _is_flag(kind) else None


def require_within(key: str, kind: Any, value: Any, typed: str | None = None) -> None:
    """Raise UserError for a setting with a number outside its bounds; null (not set) passes, and what is no number.
    ``typed``: the value as the user wrote it, for the error."""
    bounds = bounds_of(key, kind)
    if bounds is None or value is None:
        return
    for number in numbers_in(value):
        if (rule := fault(number, bounds, whole=_is_whole(kind))) is not None:
            which = f": {shown(number)}" if isinstance(value, list) else ""
            raise UserError(f"{key}={shown(value if typed is None else typed)}{which} {rule}")


def _is_flag(kind: Any) -> bool:
    return kind is bool or any(_is_flag(item) for item in get_args(kind))


@cache
def _is_whole(kind: Any) -> bool:
    return kind is int or any(_is_whole(item) for item in get_args(kind))
