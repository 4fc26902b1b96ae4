"""Promise: the ranks of any layout write the texts of one process, plainly and with drafts, alone and in a ragged batch; and none
of them holds the whole model.

float32: layouts differ by the order of sums only, and no text here has a tie so near.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import MTPConfig
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import random_model, taught
from tests.decoding.test_engine import PATTERN
from tests.decoding.test_generate import save
from tests.distributed.pool import run_jobs
from tests.distributed.tasks.decoding import run

VOCABULARY, ROWS = 23, 25
"""Tokens, and rows of the model: odd, so that tensor ranks hold unequal shares, and more, so that some are never drawn."""
PROMPTS = [[7, 8, 9], [1], [3, 4, 5, 3, 2, 7, 8], [20, 13, 1, 2]]
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "repeat": {"repeat": True, "tie": False},
    "parallel": {"kind": "parallel"},
    "medusa": {"kind": "medusa", "projection": "own"},
    "notebook": {"kind": "notebook"},
    "own_matrices": {"embedding": "own", "projection": "own", "tie": False},
    "eagle": {"kind": "eagle"},
    "eagle3": {"kind": "eagle3", "draft_tokens": [1, 2, 3, 4, 5, 7, 9, *range(13, 23)]},
}
STEPS = {"other": 25}
"""Steps that a model is taught, where not 60: one that drafts for others."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2_1f1b": {"pipeline": 2, "schedule": "1f1b"},
    "pp2_heads_alone": {"pipeline": 2, "schedule": "1f1b", "placement": "[4,0]"},
    "pp2_zbv": {"pipeline": 2, "schedule": "zbv"},
    "pp2_interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "tp2": {"tensor": 2},
    "pp4_1f1b": {"pipeline": 4, "schedule": "1f1b"},
    "pp2_1f1b_tp2": {"pipeline": 2, "schedule": "1f1b", "tensor": 2},
    "pp2_zbv_tp2": {"pipeline": 2, "schedule": "zbv", "tensor": 2},
    "dp2_tp2": {"data": 2, "tensor": 2},
    "tp4": {"tensor": 4},  # of two key/value heads
}
CELLS = [
    *((layout, "sequential") for layout in LAYOUTS),
    *((layout, kind) for layout in ("pp2_heads_alone", "pp2_zbv_tp2") for kind in KINDS if kind != "sequential"),
    ("tp4", "eagle3"),
]
GREEDY = {"max_new_tokens": 16, "temperature": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rows": [0], "mode": "plain", **GREEDY},
    "plain batch": {"rows": [0, 1, 2, 3], "mode": "plain", **GREEDY},
    "drafts": {"rows": [2], "mode": "speculative", "draft": 2, **GREEDY},
    "drafts batch": {"rows": [0, 1, 2, 3], "mode": "speculative", "draft": 2, **GREEDY},
    "more than places": {"rows": [0, 1, 2, 3, 0], "side_by_side": 2, "mode": "speculative", "draft": 2, **GREEDY},
    "drawn, more than places": {
        "rows": [3, 1, 2], "side_by_side": 2, "mode": "speculative", "max_new_tokens": 12, "temperature": 0.9,
    },
    "past the end": {"rows": [0, 3], "mode": "speculative", "stop_at_eos": False, **GREEDY},
    "drawn": {"rows": [3, 1], "mode": "speculative", "max_new_tokens": 12, "temperature": 0.9, "top_k": 9, "top_p": 0.95},
    "lookup": {"rows": [0, 1, 2], "mode": "speculative", "drafter": "ngram", **GREEDY},
    "another model": {"rows": [0, 2], "mode": "speculative", "drafter": "model", "draft": 3, **GREEDY},
    "tree": {"rows": [0, 1, 2, 3], "mode": "speculative", "tree": "static", **GREEDY},
    "drawn tree": {"rows": [3, 1], "mode": "speculative", "tree": "static", "max_new_tokens": 12, "temperature": 0.9},
    "dynamic tree": {"rows": [2, 1], "mode": "speculative", "tree": "dynamic", "tree_nodes": 7, "tree_width": 3, **GREEDY},
    "drawn dynamic tree": {
        "rows": [3, 1], "mode": "speculative", "tree": "dynamic", "tree_nodes": 7, "tree_width": 3, "max_new_tokens": 12,
        "temperature": 0.9,
    },
    "auto": {"rows": [0], "mode": "speculative", "auto": True, **GREEDY},
}
TIMED = ("auto",)
"""Cases whose drafts depend on the clock; their texts do not."""


def world(layout: str) -> int:
    sizes = LAYOUTS[layout]
    return int(sizes.get("pipeline", 1) * sizes.get("tensor", 1) * sizes.get("data", 1))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> a checkpoint of a model that knows a pattern, its heads only roughly: drafts are partly right."""
    folder = tmp_path_factory.mktemp("decoding")

    @cache
    def of(kind: str) -> Path:
        settings = {"layers": 4, "std": 0.05, "seed": 5, "vocabulary": ROWS, **KINDS.get(kind, {})}
        chunk = taught(random_model(2, **settings), PATTERN, steps=STEPS.get(kind, 60))
        generator = torch.Generator().manual_seed(0)
        assert chunk.mtp is not None
        for p in chunk.mtp.parameters():
            p.data += torch.empty_like(p).normal_(0, 0.1, generator=generator)
        mtp = {key: value for key, value in KINDS.get(kind, {}).items() if key not in ("tie", "draft_tokens")}
        mtp["draft_vocabulary"] = chunk.draft_vocabulary
        return save(folder / kind, chunk, MTPConfig(**{"kind": "sequential", "depth": 2, **mtp}))

    return of


def cases(kind: str, checkpoints: Callable[[str], Path]) -> list[dict[str, Any]]:
    return [
        case | ({"draft_model": str(checkpoints("other"))} if case.get("drafter") == "model" else {}) for case in CASES.values()
    ]


@pytest.fixture(scope="session")
def alone(checkpoints: Callable[[str], Path]) -> Callable[[str], list[Any]]:
    """Kind -> the texts of each case, by one process."""

    @cache
    def of(kind: str) -> list[Any]:
        model: Chunk = Checkpoint(checkpoints(kind)).load_model()
        return [run(model, case, PROMPTS, VOCABULARY) for case in cases(kind, checkpoints)]

    return of


@pytest.fixture(scope="session")
def together(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    """(layout, kind) -> what each rank returned."""

    @cache
    def of_world(size: int) -> dict[str, list[Any]]:
        jobs = [
            {
                "name": f"{layout}-{kind}",
                "task": "decode",
                "arguments": {
                    "checkpoint": str(checkpoints(kind)),
                    "parallel": LAYOUTS[layout],
                    "cases": cases(kind, checkpoints),
                    "prompts": PROMPTS,
                    "vocabulary": VOCABULARY,
                },
            }
            for layout, kind in CELLS
            if world(layout) == size
        ]
        return run_jobs(size, jobs, tmp_path_factory.mktemp("layouts"))

    return lambda layout, kind: of_world(world(layout))[f"{layout}-{kind}"]


@pytest.mark.parametrize(("layout", "kind"), CELLS)
def test_a_layout_writes_what_one_process_writes(
    layout: str, kind: str, alone: Callable[[str], list[Any]], together: Callable[[str, str], list[Any]]
) -> None:
    for rank in together(layout, kind):
        for name, found, expected in zip(CASES, rank["texts"], alone(kind), strict=True):
            count = 2 if name in TIMED else 4
            assert [text[:count] for text in found] == [text[:count] for text in expected], name


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_were_accepted_and_rejected(kind: str, alone: Callable[[str], list[Any]]) -> None:
    """Else the test above says little."""
    for names in (("drafts batch", "drawn"), ("another model",), ("tree", "drawn tree", "dynamic tree", "drawn dynamic tree")):
        texts = [text for name in names for text in alone(kind)[list(CASES).index(name)]]
        drafted, accepted = (sum(sum(text[column]) for text in texts) for column in (2, 3))
        assert 0 < accepted < drafted, names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_holds_its_part_alone(
    layout: str, checkpoints: Callable[[str], Path], together: Callable[[str, str], list[Any]]
) -> None:
    """All layers of all ranks of a replica together are the trunk, once; but key/value heads are on each rank that uses them."""
    records = Checkpoint(checkpoints("sequential")).manifest.parameters
    matrices = {name: record.shape for name, record in records.items() if name.startswith("layers.") and "norm" not in name}
    held = [{name: shape for name, shape in rank["held"].items() if name in matrices} for rank in together(layout, "sequential")]
    replicas, tensor = LAYOUTS[layout].get("data", 1), LAYOUTS[layout].get("tensor", 1)
    for keys, times in ((False, replicas), (True, replicas * max(1, tensor // 2))):
        part = {name: shape for name, shape in matrices.items() if (".key." in name or ".value." in name) == keys}
        found = sum(math.prod(rank[name]) for rank in held for name in part if name in rank)
        assert found == times * sum(map(math.prod, part.values()))
    rows = {rank["held"]["embedding.weight"][0] for rank in together(layout, "sequential") if "embedding.weight" in rank["held"]}
    assert rows == {ROWS // tensor, -(-ROWS // tensor)}
