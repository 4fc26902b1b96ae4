"""The layouts that every feature is held against, and the tiny model and data that they run.

All in float32, where one process and any layout differ only by the order of sums.
"""

import torch

from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import resolve, validate_training
from mtp_dist.data.batch import Batch

LAYOUTS: dict[str, dict[str, object]] = {
    "one_process": {},
    "one_process_zero0": {"stage": 0},
    "pp2_1f1b": {"pipeline": 2, "schedule": "1f1b"},
    "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
    "pp2_dualpipev": {"pipeline": 2, "schedule": "dualpipev"},
    "tp2": {"tensor": 2},
    "dp2_zero0": {"data": 2, "stage": 0},
    "dp2_zero1": {"data": 2},
    "dp2_zero2": {"data": 2, "stage": 2},
    "tp2_zero2": {"tensor": 2, "stage": 2},
    "pp2_1f1b_zero0": {"pipeline": 2, "schedule": "1f1b", "stage": 0},
    "tp2_zero0": {"tensor": 2, "stage": 0},
    "pp2_zbv_untied": {"pipeline": 2, "schedule": "zbv", "tie": False},
    "pp2_1f1b_untied": {"pipeline": 2, "schedule": "1f1b", "tie": False},
    "pp2_1f1b_untied_no_heads": {"pipeline": 2, "schedule": "1f1b", "tie": False, "depth": 0},
    "pp2_zbv_no_heads": {"pipeline": 2, "schedule": "zbv", "depth": 0},
    "pp2_zbv_tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2},
    "pp2_1f1b_tp2": {"pipeline": 2, "schedule": "1f1b", "tensor": 2},
    "pp2_zbv_dp2": {"pipeline": 2, "schedule": "zbv", "data": 2},
    "pp2_1f1b_dp2": {"pipeline": 2, "schedule": "1f1b", "data": 2},
    "pp2_zbv_dp2_zero0": {"pipeline": 2, "schedule": "zbv", "data": 2, "stage": 0},
    "tp2_dp2": {"tensor": 2, "data": 2},
    "pp2_interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp2_zbv_heads_alone": {"pipeline": 2, "schedule": "zbv", "placement": "[1,1,2,0]"},
    "tp2_sequence": {"tensor": 2, "sequence_parallel": True},
    "pp2_zbv_tp2_sequence": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence_parallel": True},
    "pp2_1f1b_tp2_sequence": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True},
    "pp2_zbv_full": {"pipeline": 2, "schedule": "zbv", "recompute": "full"},
    "pp2_1f1b_selective": {"pipeline": 2, "schedule": "1f1b", "recompute": "selective"},
    "tp2_sequence_selective": {"tensor": 2, "sequence_parallel": True, "recompute": "selective"},
    "pp2_zbv_causal": {"pipeline": 2, "schedule": "zbv", "document_mask": False},
    "pp4_zbv": {"pipeline": 4, "schedule": "zbv", "layers": 8},
}


def world(layout: str) -> int:
    settings = LAYOUTS[layout]
    size = 1
    for axis in ("pipeline", "tensor", "data"):
        size *= settings.get(axis, 1)  # type: ignore[assignment, operator]
    return size


def configuration(layout: str | None, **train: object) -> TrainingRun:
    """A validated tiny run; None: the one-process reference of the same model."""
    settings = dict(LAYOUTS[layout]) if layout else {}
    config = TrainingRun(run_dir="unused")
    config.model.vocab_size, config.model.layers, config.model.hidden = 96, int(settings.get("layers", 4)), 32  # type: ignore[call-overload]
    config.model.heads, config.model.kv_heads, config.model.mlp = 4, 2, 48
    # Larger than usual, so that every gradient is far from rounding noise.
    config.model.init_std = 0.15
    config.model.tie_embeddings = bool(settings.get("tie", True))
    config.model.document_mask = bool(settings.get("document_mask", True))
    config.mtp.depth = int(settings.get("depth", 2))  # type: ignore[call-overload]
    config.mtp.kind = "sequential" if config.mtp.depth else "none"
    config.mtp.depth_weights = [1.0, 0.7][: config.mtp.depth]
    for axis in ("pipeline", "tensor", "data", "schedule", "placement", "sequence_parallel"):
        setattr(config.parallel, axis, settings.get(axis, getattr(config.parallel, axis)))
    config.zero.stage = int(settings.get("stage", 1))  # type: ignore[call-overload]
    # A large eps keeps AdamW's update smooth where a gradient is nearly 0: rounding noise there would turn into whole steps.
    config.optim.lr, config.optim.clip, config.optim.eps = 1e-2, 0.5, 1e-3
    config.data.lanes = 8
    config.train.global_batch, config.train.micro_batch, config.train.sequence_length = 16, 2, 16
    config.train.steps, config.train.dtype = 3, "float32"
    config.train.recompute = str(settings.get("recompute", "none"))
    for name, value in train.items():
        setattr(config.train, name, value)
    validate_training(config, None)
    return resolve(config, None)


def global_batch(config: TrainingRun, step: int) -> Batch:
    """Rows with unlike documents on purpose: from no valid target at all to all of them, so that micro-batches and replicas
    have unequal counts."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, width = config.train.global_batch, config.train.sequence_length + 1 + config.mtp.depth
    tokens = torch.randint(0, 96, (rows, width), generator=generator)
    # Row r starts a new document with probability rising from 0 to 1/2; row 5 is padding.
    starts = torch.rand(rows, width, generator=generator) < torch.linspace(0, 0.5, rows).unsqueeze(1)
    documents = starts.cumsum(1).int()
    documents[5] = -1
    return Batch(tokens, documents, [[] for _ in range(rows)])


def replica_batch(config: TrainingRun, step: int, replica: int) -> Batch:
    whole = global_batch(config, step)
    share = config.train.global_batch // config.parallel.data
    part = slice(replica * share, (replica + 1) * share)
    return Batch(whole.tokens[part], whole.documents[part], whole.samples[part])
