"""The layouts that every feature is held against, and the tiny model and data that they run.

The named ones are in float32, where one process and any layout differ only by the order of sums; ``cells`` has the generated
ones.
"""

from typing import Any

import torch

from mtp_dist.config.heads import lookahead
from mtp_dist.config.layout import chunks
from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import TrainingRun
from mtp_dist.config.validation import validate_training
from mtp_dist.data.batch import Batch

ROWS = 16
"""Rows of a global batch."""

# A step has 256 tokens: the first trains one depth, the second three, the next two none, the others two.
CURRICULUM = {"depth": 3, "curriculum": [[0, 1], [256, 3], [512, 0], [1024, 2]]}

LAYOUTS: dict[str, dict[str, Any]] = {
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
    "dp2_zero3": {"data": 2, "stage": 3},
    "tp2_dp2_zero3": {"tensor": 2, "data": 2, "stage": 3},
    "dp2_zero1_offload": {"data": 2, "stage": 1, "offload": True},
    "dp2_zero2_offload": {"data": 2, "stage": 2, "offload": True},
    "dp2_zero3_offload": {"data": 2, "stage": 3, "offload": True},
    "tp2_zero1_offload": {"tensor": 2, "stage": 1, "offload": True},
    "dp2_zero3_full": {"data": 2, "stage": 3, "recompute": "full"},
    "dp2_zero3_untied": {"data": 2, "stage": 3, "tie": False},
    "dp2_zero3_no_heads": {"data": 2, "stage": 3, "depth": 0},
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
    "tp2_sequence_zero2": {"tensor": 2, "sequence_parallel": True, "stage": 2},
    "tp2_dp2_sequence_zero3": {"tensor": 2, "data": 2, "sequence_parallel": True, "stage": 3},
    "tp2_dp2_sequence_zero2_full": {"tensor": 2, "data": 2, "sequence_parallel": True, "stage": 2, "recompute": "full"},
    "pp2_zbv_tp2_sequence": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence_parallel": True},
    "pp2_1f1b_tp2_sequence": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True},
    "pp2_zbv_full": {"pipeline": 2, "schedule": "zbv", "recompute": "full"},
    "pp2_1f1b_selective": {"pipeline": 2, "schedule": "1f1b", "recompute": "selective"},
    "tp2_sequence_selective": {"tensor": 2, "sequence_parallel": True, "recompute": "selective"},
    "pp2_zbv_causal": {"pipeline": 2, "schedule": "zbv", "document_mask": False},
    "tp2_odd": {"tensor": 2, "vocabulary": 97},
    "pp2_1f1b_tp2_odd": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "vocabulary": 97},
    "pp2_zbv_tp2_odd_sequence": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence_parallel": True, "vocabulary": 97},
    "pp4_zbv": {"pipeline": 4, "schedule": "zbv", "layers": 8},
    "one_process_frozen": {"freeze_trunk": True},
    "dp2_frozen": {"data": 2, "freeze_trunk": True},
    "dp2_zero0_frozen": {"data": 2, "stage": 0, "freeze_trunk": True},
    "dp2_zero3_frozen": {"data": 2, "stage": 3, "freeze_trunk": True},
    "pp2_1f1b_frozen": {"pipeline": 2, "schedule": "1f1b", "freeze_trunk": True},
    "pp2_interleaved_frozen": {"pipeline": 2, "schedule": "interleaved", "freeze_trunk": True},
    "pp2_zbv_frozen": {"pipeline": 2, "schedule": "zbv", "freeze_trunk": True},
    "pp2_dualpipev_frozen": {"pipeline": 2, "schedule": "dualpipev", "freeze_trunk": True},
    "tp2_sequence_frozen": {"tensor": 2, "sequence_parallel": True, "freeze_trunk": True},
    "pp2_1f1b_tp2_sequence_frozen": {
        "pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True, "freeze_trunk": True},
    "pp2_1f1b_head_rate": {"pipeline": 2, "schedule": "1f1b", "head_lr_ratio": 3.0},
    "dp2_zero3_head_rate": {"data": 2, "stage": 3, "head_lr_ratio": 3.0},
    **{
        f"{name}_{option}": where | what
        for option, what in {
            "repeat": {"repeat": True, "decay": 0.6, "depth": 3},
            "blocks2_detach": {"blocks": 2, "detach": True},
            "parallel": {"kind": "parallel"},
            "medusa": {"kind": "medusa", "blocks": 2},
            "notebook": {"kind": "notebook"},
            "medusa_own": {"kind": "medusa", "projection": "own"},
            "stride": {"stride": 3},
            "own_matrices": {"embedding": "own", "projection": "own", "tie": False},
            "sampled": {"scheduled_sampling": 0.5, "depth": 3, "main_loss_weight": 0.6},
            "koala": {"blocks": 2, "targets": "trunk", "adversarial": 0.5},
            "soft": {"targets": "trunk", "depth": 3},
        }.items()
        for name, where in {
            "pp2_1f1b": {"pipeline": 2, "schedule": "1f1b"},
            "pp2_zbv_heads_alone": {"pipeline": 2, "schedule": "zbv", "placement": "[1,1,2,0]"},
            "tp2_sequence": {"tensor": 2, "sequence_parallel": True},
            "dp2": {"data": 2},
            "dp2_zero3": {"data": 2, "stage": 3},
        }.items()
    },
    **{
        f"{name}_parallel": where | {"kind": "parallel"}
        for name, where in {
            "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
            "pp2_zbv_untied": {"pipeline": 2, "schedule": "zbv", "tie": False},
            "pp2_1f1b_heads_alone_untied": {"pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "tie": False},
            "pp2_1f1b_heads_alone_frozen": {"pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "freeze_trunk": True},
            "pp2_1f1b_heads_alone_detach": {"pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "detach": True},
            "pp2_1f1b_heads_alone_tp2_sequence": {
                "pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "tensor": 2, "sequence_parallel": True},
            "pp2_zbv_final": {"pipeline": 2, "schedule": "zbv", "branch": "final"},
            "pp2_zbv_heads_alone_full": {"pipeline": 2, "schedule": "zbv", "placement": "[1,1,2,0]", "recompute": "full"},
        }.items()
    },
    **{
        f"{name}_eagle3": where | {"kind": "eagle3"}
        for name, where in {
            "one_process": {"depth": 3},
            "pp2_zbv": {"pipeline": 2, "schedule": "zbv", "taps": [0, 2, 4]},
            "pp2_1f1b_heads_alone_untied": {"pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "tie": False},
            "tp2_sequence": {"tensor": 2, "sequence_parallel": True, "depth": 3},
            "dp2": {"data": 2, "document_mask": False},
            "dp2_zero3": {"data": 2, "stage": 3},
            "pp2_zbv_frozen": {"pipeline": 2, "schedule": "zbv", "freeze_trunk": True, "targets": "trunk"},
            "pp2_1f1b_tp2_sequence": {
                "pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True, "recompute": "full"},
        }.items()
    },
    "pp2_zbv_frozen_soft": {"pipeline": 2, "schedule": "zbv", "freeze_trunk": True, "targets": "trunk"},
    "pp2_1f1b_tp2_odd_soft": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "vocabulary": 97, "targets": "trunk"},
    "one_process_soft_detach": {"targets": "trunk", "detach": True},
    "tp2_adversary": {"tensor": 2, "targets": "trunk", "adversarial": 0.5},
    "pp2_zbv_frozen_koala": {
        "pipeline": 2, "schedule": "zbv", "freeze_trunk": True, "blocks": 2, "targets": "trunk", "adversarial": 0.5},
    "pp2_zbv_tp2_koala_medusa": {
        "pipeline": 2, "schedule": "zbv", "tensor": 2, "kind": "medusa", "blocks": 2, "targets": "trunk", "adversarial": 0.5},
    "dp2_zero2_full_koala_untied": {
        "data": 2, "stage": 2, "recompute": "full", "blocks": 2, "targets": "trunk", "adversarial": 0.5, "tie": False},
    "pp2_zbv_tp2_medusa_own": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "kind": "medusa", "projection": "own"},
    "pp2_zbv_medusa_own_untied_frozen": {
        "pipeline": 2, "schedule": "zbv", "kind": "medusa", "projection": "own", "tie": False, "freeze_trunk": True},
    "dp2_zero3_medusa_own_untied_soft": {
        "data": 2, "stage": 3, "kind": "medusa", "projection": "own", "tie": False, "targets": "trunk"},
    "dp2_zero2_medusa_own_detach": {"data": 2, "stage": 2, "kind": "medusa", "projection": "own", "detach": True},
    **{
        f"{name}_eagle": where | {"kind": "eagle"}
        for name, where in {
            "one_process": {"depth": 3},
            "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
            "pp2_1f1b_untied": {"pipeline": 2, "schedule": "1f1b", "tie": False, "h0": "pre_norm"},
            "tp2_sequence": {"tensor": 2, "sequence_parallel": True},
            "dp2": {"data": 2},
            "dp2_zero3": {"data": 2, "stage": 3},
            "pp2_1f1b_frozen": {"pipeline": 2, "schedule": "1f1b", "freeze_trunk": True, "targets": "trunk"},
            "pp2_zbv_tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "recompute": "full", "targets": "trunk"},
        }.items()
    },
    **{
        f"{name}_curriculum": where | CURRICULUM
        for name, where in {
            "one_process": {},
            "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
            "pp2_dualpipev": {"pipeline": 2, "schedule": "dualpipev"},
            "pp2_1f1b_untied": {"pipeline": 2, "schedule": "1f1b", "tie": False},
            "pp2_interleaved_medusa": {"pipeline": 2, "schedule": "interleaved", "kind": "medusa"},
            "pp2_zbv_heads_alone_parallel": {"pipeline": 2, "schedule": "zbv", "placement": "[1,1,2,0]", "kind": "parallel"},
            "tp2_sequence": {"tensor": 2, "sequence_parallel": True},
            "dp2_zero0": {"data": 2, "stage": 0},
            "dp2_zero1_repeat": {"data": 2, "repeat": True},
            "dp2_zero2": {"data": 2, "stage": 2},
            "dp2_zero3": {"data": 2, "stage": 3},
        }.items()
    },
    "pp2_zbv_frozen_curriculum": {
        "pipeline": 2, "schedule": "zbv", "freeze_trunk": True, "depth": 3, "curriculum": [[0, 1], [256, 3], [512, 2]]},
    "pp2_zbv_stride": {"pipeline": 2, "schedule": "zbv", "stride": 2, **CURRICULUM},
    "pp2_1f1b_frozen_parallel_stride": {
        "pipeline": 2, "schedule": "1f1b", "kind": "parallel", "freeze_trunk": True, "stride": 2, "depth": 3},
    "tp2_notebook_stride": {"tensor": 2, "kind": "notebook", "stride": 4},
    "pp2_zbv_medusa": {"pipeline": 2, "schedule": "zbv", "kind": "medusa"},
    "pp2_1f1b_untied_medusa": {"pipeline": 2, "schedule": "1f1b", "kind": "medusa", "tie": False},
    "pp2_1f1b_frozen_medusa": {"pipeline": 2, "schedule": "1f1b", "kind": "medusa", "freeze_trunk": True},
    "pp2_zbv_notebook": {"pipeline": 2, "schedule": "zbv", "kind": "notebook"},
    "tp2_frozen_notebook": {"tensor": 2, "kind": "notebook", "freeze_trunk": True},
    "pp2_1f1b_tp2_notebook": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "kind": "notebook", "blocks": 2},
}


ESSENTIAL = frozenset({
    "one_process", "one_process_zero0", "pp2_1f1b", "pp2_zbv", "pp2_dualpipev", "pp2_interleaved", "pp4_zbv", "tp2_sequence",
    "dp2_zero0", "dp2_zero1", "dp2_zero2", "dp2_zero3", "dp2_zero1_offload", "pp2_zbv_untied", "pp2_1f1b_selective",
    "pp2_zbv_full", "pp2_zbv_heads_alone", "pp2_zbv_causal", "pp2_1f1b_tp2_odd", "tp2_dp2_sequence_zero3", "pp2_zbv_tp2",
    "pp2_1f1b_dp2",
    "dp2_zero3_frozen", "pp2_1f1b_frozen", "pp2_1f1b_head_rate", "pp2_1f1b_repeat", "tp2_sequence_blocks2_detach",
    "pp2_zbv_heads_alone_parallel", "dp2_medusa", "pp2_zbv_medusa", "pp2_1f1b_medusa_own", "tp2_sequence_notebook",
    "pp2_1f1b_frozen_eagle", "dp2_zero3_eagle", "pp2_zbv_eagle3", "tp2_sequence_eagle3", "tp2_sequence_soft",
    "tp2_sequence_koala", "pp2_zbv_curriculum", "tp2_sequence_stride", "tp2_odd_eagle_draft_vocabulary",
    "pp2_1f1b_own_matrices", "tp2_sequence_sampled", "dp2_zero3_own_matrices_sampled_notebook",
})  # fmt: skip
"""Layouts that every test run trains; the others are for a full one. Of each schedule, stage and kind of head there is one."""


LAYOUTS |= {
    f"{name}_top": where | {"kind": "top", "depth": 1}
    for name, where in {
        "one_process": {},
        "pp2_zbv": {"pipeline": 2, "schedule": "zbv", "window": 4},
        "pp2_1f1b_untied": {"pipeline": 2, "schedule": "1f1b", "tie": False},
        "tp2_sequence": {"tensor": 2, "sequence_parallel": True, "vocabulary": 97},
        "dp2": {"data": 2, "dtype": "bfloat16"},
        "dp2_zero3": {"data": 2, "stage": 3},
        "pp2_1f1b_frozen": {"pipeline": 2, "schedule": "1f1b", "freeze_trunk": True},
        "pp2_zbv_tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "recompute": "full", "detach": True},
    }.items()
}
LAYOUTS |= {
    f"{name}_draft_vocabulary": where | {"draft_vocabulary": 30}  # which ones: ``draft_tokens``
    for name, where in {
        "one_process_eagle3": {"kind": "eagle3", "depth": 3},
        "pp2_zbv_eagle": {"pipeline": 2, "schedule": "zbv", "kind": "eagle", "targets": "trunk"},
        "pp2_1f1b_untied_eagle3": {"pipeline": 2, "schedule": "1f1b", "kind": "eagle3", "tie": False},
        "tp2_sequence_eagle3": {"tensor": 2, "sequence_parallel": True, "kind": "eagle3", "targets": "trunk"},
        "tp2_odd_eagle": {"tensor": 2, "vocabulary": 97, "kind": "eagle", "targets": "trunk"},
        "dp2_eagle3": {"data": 2, "kind": "eagle3"},
        "dp2_zero3_eagle": {"data": 2, "stage": 3, "kind": "eagle", "targets": "trunk"},
        "pp2_zbv_tp2_frozen_eagle": {
            "pipeline": 2, "schedule": "zbv", "tensor": 2, "kind": "eagle", "freeze_trunk": True, "recompute": "full"},
    }.items()
}

# More tensor ranks than key/value heads: neighbours hold the same head. Two heads unless a layout says one.
SHARED_KEYS = {
    "tp2_one_key": {"tensor": 2, "kv_heads": 1},
    "tp2_one_key_zero0": {"tensor": 2, "kv_heads": 1, "stage": 0},
    "tp2_one_key_zero2": {"tensor": 2, "kv_heads": 1, "stage": 2},
    "tp2_dp2_one_key_zero3": {"tensor": 2, "kv_heads": 1, "data": 2, "stage": 3},
    "tp2_dp2_one_key_zero3_offload": {"tensor": 2, "kv_heads": 1, "data": 2, "stage": 3, "offload": True},
    "tp2_one_key_zero1_offload": {"tensor": 2, "kv_heads": 1, "offload": True},
    "tp2_one_key_bfloat16": {"tensor": 2, "kv_heads": 1, "dtype": "bfloat16"},
    "tp2_dp2_one_key_sequence_bfloat16": {
        "tensor": 2, "kv_heads": 1, "data": 2, "sequence_parallel": True, "dtype": "bfloat16"},
    "tp2_one_key_sequence_zero2_full": {
        "tensor": 2, "kv_heads": 1, "sequence_parallel": True, "stage": 2, "recompute": "full"},
    "pp2_zbv_tp2_one_key": {"pipeline": 2, "schedule": "zbv", "tensor": 2, "kv_heads": 1},
    "pp2_zbv_tp2_one_key_sequence": {
        "pipeline": 2, "schedule": "zbv", "tensor": 2, "kv_heads": 1, "sequence_parallel": True},
    "pp2_dualpipev_tp2_one_key": {"pipeline": 2, "schedule": "dualpipev", "tensor": 2, "kv_heads": 1},
    "pp2_1f1b_tp2_one_key_selective": {
        "pipeline": 2, "schedule": "1f1b", "tensor": 2, "kv_heads": 1, "recompute": "selective"},
    "pp2_1f1b_tp2_one_key_heads_alone_zero0": {
        "pipeline": 2, "schedule": "1f1b", "placement": "[4,0]", "tensor": 2, "kv_heads": 1, "stage": 0},
    "pp2_zbv_tp2_one_key_frozen": {
        "pipeline": 2, "schedule": "zbv", "tensor": 2, "kv_heads": 1, "freeze_trunk": True},
    "pp2_1f1b_tp2_one_key_medusa": {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "kv_heads": 1, "kind": "medusa"},
    "tp4_shared_keys": {"tensor": 4},
    "tp4_shared_keys_zero0": {"tensor": 4, "stage": 0},
    "tp4_shared_keys_zero2": {"tensor": 4, "stage": 2},
    "tp4_one_key": {"tensor": 4, "kv_heads": 1},
    "tp4_shared_keys_odd_sequence": {"tensor": 4, "vocabulary": 97, "sequence_parallel": True},
    "tp4_one_key_frozen": {"tensor": 4, "kv_heads": 1, "freeze_trunk": True},
    "tp4_shared_keys_sequence_eagle3": {"tensor": 4, "sequence_parallel": True, "kind": "eagle3", "depth": 3},
    "tp4_one_key_eagle": {"tensor": 4, "kv_heads": 1, "kind": "eagle", "targets": "trunk"},
    "tp4_shared_keys_parallel": {"tensor": 4, "kind": "parallel"},
    "tp4_shared_keys_repeat_blocks": {"tensor": 4, "repeat": True, "blocks": 2, "depth": 3},
    "pp2_zbv_tp4_shared_keys": {"pipeline": 2, "schedule": "zbv", "tensor": 4},
    "pp2_1f1b_tp4_shared_keys_sequence": {"pipeline": 2, "schedule": "1f1b", "tensor": 4, "sequence_parallel": True},
    "tp4_dp2_shared_keys_zero3": {"tensor": 4, "data": 2, "stage": 3},
}
LAYOUTS |= SHARED_KEYS

# Fewer micro-batches than pipeline ranks.
LAYOUTS |= {
    f"{name}_few": where | {"micro_batch": ROWS // (where.get("data", 1) * passes)}
    for name, (passes, where) in {
        "pp2_1f1b": (1, {"pipeline": 2, "schedule": "1f1b"}),
        "pp2_1f1b_zero0_selective": (1, {"pipeline": 2, "schedule": "1f1b", "stage": 0, "recompute": "selective"}),
        "pp2_1f1b_tp2_sequence": (1, {"pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True}),
        "pp2_1f1b_dp2_untied": (1, {"pipeline": 2, "schedule": "1f1b", "data": 2, "tie": False}),
        "pp2_interleaved": (1, {"pipeline": 2, "schedule": "interleaved"}),
        "pp2_zbv": (1, {"pipeline": 2, "schedule": "zbv"}),
        "pp4_1f1b": (2, {"pipeline": 4, "schedule": "1f1b"}),
        "pp4_1f1b_one_eagle3": (1, {"pipeline": 4, "schedule": "1f1b", "kind": "eagle3"}),
        "pp4_1f1b_heads_alone": (2, {"pipeline": 4, "schedule": "1f1b", "placement": "[1,1,2,0]"}),
        "pp4_1f1b_frozen": (2, {"pipeline": 4, "schedule": "1f1b", "freeze_trunk": True}),
        "pp4_interleaved": (2, {"pipeline": 4, "schedule": "interleaved"}),
        "pp4_interleaved_one": (1, {"pipeline": 4, "schedule": "interleaved"}),
        "pp4_zbv": (2, {"pipeline": 4, "schedule": "zbv"}),
    }.items()
}

ESSENTIAL |= {
    "tp2_one_key_bfloat16", "tp2_one_key_zero2", "tp2_dp2_one_key_zero3", "pp2_zbv_tp2_one_key_sequence", "tp4_shared_keys",
    "tp4_shared_keys_zero0", "tp4_one_key_frozen", "tp4_shared_keys_sequence_eagle3", "pp4_1f1b_few", "pp2_1f1b_few",
    "pp4_interleaved_few",
}  # fmt: skip

LAYOUTS |= {
    "pp2_1f1b_tied_own_matrices": {"pipeline": 2, "schedule": "1f1b", "embedding": "own", "projection": "own"},
    "pp2_zbv_tp2_odd_own_matrices": {
        "pipeline": 2, "schedule": "zbv", "tensor": 2, "vocabulary": 97, "embedding": "own", "projection": "own"},
    "pp2_1f1b_tp2_sequence_own_embedding_notebook": {
        "pipeline": 2, "schedule": "1f1b", "tensor": 2, "sequence_parallel": True, "kind": "notebook", "embedding": "own",
        "depth": 3, "repeat": True},
    "dp2_zero3_own_matrices_frozen": {
        "data": 2, "stage": 3, "embedding": "own", "projection": "own", "freeze_trunk": True},
    "dp2_zero3_own_matrices_sampled_notebook": {
        "data": 2, "stage": 3, "kind": "notebook", "embedding": "own", "projection": "own", "scheduled_sampling": 0.5},
    "dp2_zero2_own_matrices_sampled_repeat": {
        "data": 2, "stage": 2, "embedding": "own", "projection": "own", "repeat": True, "depth": 3, "scheduled_sampling": 0.5},
    "pp2_1f1b_tp2_odd_sampled": {
        "pipeline": 2, "schedule": "1f1b", "tensor": 2, "vocabulary": 97, "tie": False, "scheduled_sampling": 1.0},
    "pp2_zbv_tp2_sequence_sampled_own_notebook": {
        "pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence_parallel": True, "kind": "notebook", "projection": "own",
        "recompute": "full", "scheduled_sampling": 0.5},
    "pp2_dualpipev_sampled_soft_detach": {
        "pipeline": 2, "schedule": "dualpipev", "targets": "trunk", "detach": True, "scheduled_sampling": 0.5},
    "pp2_1f1b_sampled_frozen": {"pipeline": 2, "schedule": "1f1b", "freeze_trunk": True, "scheduled_sampling": 0.5},
    "pp2_zbv_sampled_curriculum": {"pipeline": 2, "schedule": "zbv", "scheduled_sampling": 0.5} | CURRICULUM,
    # From the second step on, in a model that has been traced without.
    "dp2_zero3_sampled_later": {"data": 2, "stage": 3, "tie": False, "scheduled_sampling_points": [[256, 0.5]]},
    "dp2_sampled_bfloat16": {"data": 2, "dtype": "bfloat16", "scheduled_sampling": 0.5},
}

PATHS = {
    "pipeline": "parallel.pipeline",
    "tensor": "parallel.tensor",
    "data": "parallel.data",
    "schedule": "parallel.schedule",
    "placement": "parallel.placement",
    "sequence_parallel": "parallel.sequence_parallel",
    "layers": "model.layers",
    "kv_heads": "model.kv_heads",
    "vocabulary": "model.vocab_size",
    "tie": "model.tie_embeddings",
    "document_mask": "model.document_mask",
    "depth": "mtp.depth",
    "stage": "zero.stage",
    "recompute": "train.recompute",
    "attention": "train.attention",
    "dtype": "train.dtype",
    "offload": "zero.offload",
    "freeze_trunk": "mtp.freeze_trunk",
    "kind": "mtp.kind",
    "h0": "mtp.h0",
    "taps": "mtp.taps",
    "branch": "mtp.branch",
    "targets": "mtp.targets",
    "adversarial": "mtp.adversarial",
    "projection": "mtp.projection",
    "embedding": "mtp.embedding",
    "scheduled_sampling": "mtp.scheduled_sampling",
    "scheduled_sampling_points": "mtp.scheduled_sampling_points",
    "main_loss_weight": "mtp.main_loss_weight",
    "draft_vocabulary": "mtp.draft_vocabulary",
    "window": "mtp.window",
    "repeat": "mtp.repeat",
    "stride": "mtp.stride",
    "curriculum": "mtp.curriculum",
    "decay": "mtp.decay",
    "blocks": "mtp.blocks",
    "detach": "mtp.detach",
    "head_lr_ratio": "optim.head_lr_ratio",
    "micro_batch": "train.micro_batch",
}
"""Short name of a setting in a layout -> the setting. A feature joins the grid by a line here."""

def world(layout: str) -> int:
    """Processes of a named layout."""
    return processes(LAYOUTS[layout])


def processes(settings: dict[str, Any]) -> int:
    """Processes of a layout given by its settings."""
    return settings.get("pipeline", 1) * settings.get("tensor", 1) * settings.get("data", 1)


def unchecked(settings: dict[str, Any]) -> TrainingRun:
    """The tiny run of a layout's settings, before its rules are checked."""
    config = TrainingRun(run_dir="unused")
    config.model.vocab_size, config.model.hidden = 96, 32
    config.model.heads, config.model.kv_heads, config.model.mlp = 4, 2, 48
    # Larger than usual, so that every gradient is far from rounding noise.
    config.model.init_std = 0.15
    config.train.steps, config.train.dtype, config.train.sequence_length = 3, "float32", 16
    # A large eps keeps AdamW's update smooth where a gradient is nearly 0: rounding noise there would turn into whole steps.
    config.optim.lr, config.optim.clip, config.optim.eps = 1e-2, 0.5, 1e-2
    config.data.lanes, config.train.global_batch, config.train.micro_batch = 8, ROWS, 2
    for name, value in settings.items():
        group, _, field = PATHS[name].partition(".")
        setattr(getattr(config, group), field, value)
    config.mtp.kind = settings.get("kind", "sequential" if config.mtp.depth else "none")
    if config.mtp.decay == 1:
        config.mtp.depth_weights = [1.0, 0.7, 1.3][: config.mtp.depth]
    if "layers" not in settings:
        config.model.layers = max(4, chunks(config.parallel))
    return config


def configuration(layout: str | dict[str, Any], **train: object) -> TrainingRun:
    """A validated tiny run of a named layout, or of one given by its settings."""
    config = unchecked(LAYOUTS[layout] if isinstance(layout, str) else layout)
    for name, value in train.items():
        setattr(config.train, name, value)
    validate_training(config, None)
    return resolve(config, None)


def draft_tokens(config: TrainingRun) -> list[int]:
    """As many as ``mtp.draft_vocabulary`` asks for, here and there, the last one included; under sequence parallelism the first
    ones, of which the second tensor rank has none."""
    number, last = config.mtp.draft_vocabulary or 0, (config.model.vocab_size or 0) - 1
    return list(range(number)) if config.parallel.sequence_parallel else [last - 3 * place for place in range(number)][::-1]


def global_batch(config: TrainingRun, step: int) -> Batch:
    """Rows with unlike documents on purpose: from no valid target at all to all of them, so that micro-batches and replicas
    have unequal counts."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, width = config.train.global_batch, config.train.sequence_length + 1 + lookahead(config.mtp)
    tokens = torch.randint(0, config.model.vocab_size or 1, (rows, width), generator=generator)
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
