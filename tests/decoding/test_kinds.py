"""Promise: a model with any kind of heads decodes plainly, from its trunk alone; what has no drafter or no name in an export is
refused in one line that says what works."""

from typing import Any

import pytest
import torch

from mtp_dist.config.heads import KINDS
from mtp_dist.config.schema import DecodeConfig, ModelConfig, MTPConfig
from mtp_dist.decoding.engine import generate
from mtp_dist.decoding.request import DRAFTING, fitted, validate_heads
from mtp_dist.errors import UserError
from mtp_dist.interop.hugging_face import require_expressible
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize

OTHERS: list[dict[str, Any]] = [
    {"kind": "parallel"},
    {"kind": "medusa"},
    {"kind": "eagle"},
    {"kind": "eagle3"},
    {"kind": "sequential", "blocks": 2},
    {"kind": "sequential", "embedding": "own"},
    {"kind": "sequential", "projection": "own"},
]


@pytest.mark.parametrize("heads", OTHERS, ids=lambda heads: heads["kind"])
def test_plain_text_is_the_trunks(heads: dict[str, Any]) -> None:
    model = ModelConfig(vocab_size=23, layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, mlp=48, init_std=0.3)
    texts = []
    for mtp in (MTPConfig(depth=2, **heads), MTPConfig(kind="none", depth=0)):
        with torch.device("meta"):
            chunk = Chunk(model, mtp, range(2))
        initialize(chunk, 1)
        texts.append(generate(chunk.eval(), [1, 2, 3], DecodeConfig(mode="plain", max_new_tokens=8)).tokens)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_leaping_heads_neither_draft_nor_export() -> None:
    mtp = MTPConfig(depth=2, stride=2)
    validate_heads(DecodeConfig(mode="plain"), mtp)
    with pytest.raises(UserError, match=r"mtp\.stride=2 leap over some; choose decode\.mode=plain"):
        validate_heads(DecodeConfig(mode="both"), mtp)
    with pytest.raises(UserError, match=r"mtp\.stride=2.*choose heads=false"):
        require_expressible(ModelConfig(), mtp)


@pytest.mark.parametrize("heads", OTHERS, ids=lambda heads: heads["kind"])
def test_exporting_is_refused(heads: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="choose heads=false"):
        require_expressible(ModelConfig(), MTPConfig(depth=2, **heads))
    with pytest.raises(UserError, match=r"mtp\.repeat=true"):
        require_expressible(ModelConfig(), MTPConfig(repeat=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_drafts_or_is_refused_in_one_line(kind: str) -> None:
    mtp = MTPConfig(kind=kind, depth=0 if kind == "none" else 2)
    validate_heads(DecodeConfig(mode="plain"), mtp)
    validate_heads(DecodeConfig(drafter="ngram", draft=9), mtp)
    if kind == "none":
        with pytest.raises(UserError, match=r"this model has none; choose decode\.mode=plain"):
            validate_heads(DecodeConfig(), mtp)
    elif kind not in DRAFTING:
        with pytest.raises(UserError, match=rf"mtp\.kind={kind} drafts nothing; choose decode\.drafter=ngram"):
            validate_heads(DecodeConfig(), mtp)
    else:
        validate_heads(DecodeConfig(draft=2), mtp)


def test_heads_side_by_side_are_not_recycled() -> None:
    with pytest.raises(UserError, match=r"decode\.draft=3 is more than the model's mtp\.depth=2: .* choose at most 2"):
        validate_heads(DecodeConfig(draft=3), MTPConfig(kind="medusa", depth=2))
    validate_heads(DecodeConfig(draft=3), MTPConfig(kind="eagle", depth=2))


def test_auto_may_go_beyond_the_depth_where_a_module_can_be_recycled() -> None:
    def asked(kind: str, depth: int, **decode: Any) -> int | None:
        return fitted(DecodeConfig(**decode), MTPConfig(kind=kind, depth=depth)).draft

    assert asked("sequential", 3, auto=True) == 6
    assert asked("eagle", 1, auto=True) == 4
    assert asked("sequential", 3, auto=True, draft=2) == 2
    assert asked("sequential", 3) is None
    assert asked("medusa", 3, auto=True) is None
    assert asked("sequential", 3, auto=True, tree="dynamic") is None
    assert asked("sequential", 3, auto=True, drafter="ngram") is None
    with pytest.raises(UserError, match="this model has none"):
        asked("none", 0, auto=True)
