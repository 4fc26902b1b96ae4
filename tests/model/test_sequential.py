"""Promise: the vectorised model computes the equations of its sources. Values, losses and all gradients equal those of loops.

Tolerance: everything is float64 but the rotary angles (float32: 6e-8 of an angle) and the head's logits (float32, 6e-8 each);
1e-5 of a tensor's largest element is well above that, and below any other order of parts, norm, offset or mask.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.config.heads import learns_inside
from mtp_dist.config.schema import MTPConfig
from mtp_dist.model.attention import document_mask
from mtp_dist.model.chunk import COLUMNS, Chunk
from mtp_dist.model.mtp.heads import TrunkStates
from mtp_dist.model.mtp.sequential import SequentialHeads
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.model.trunk import rotation
from mtp_dist.training.objective import coefficients, target_scale
from tests.model import loop
from tests.model.small import VOCABULARY, close, rows, small_model

TOLERANCE = 1e-5
VARIANTS: list[dict[str, Any]] = [
    {"concat": concat, "h0": h0, "recycle": recycle}
    for concat, h0, recycle in product(("embedding_first", "hidden_first"), ("post_norm", "pre_norm"), ("post_norm", "pre_norm"))
]


def copies(chunk: Chunk) -> dict[str, Tensor]:
    """The weights alone, as leaves of another graph."""
    return {name: p.detach().clone().requires_grad_() for name, p in chunk.named_parameters()}


def settings(chunk: Chunk, **mtp: object) -> MTPConfig:
    return MTPConfig(**{"kind": "sequential" if chunk.depth else "none", "depth": chunk.depth} | mtp)  # type: ignore[arg-type]


def run(
    chunk: Chunk, mtp: MTPConfig, tokens: Tensor, documents: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, mean loss of each depth, counts) by the model's own forward pass; own: as of ``Chunk.forward``."""
    counts = valid_counts(targets(tokens, documents, mtp.depth, stride=mtp.stride, inside=learns_inside(mtp)))
    scale = target_scale(coefficients(mtp, 0), counts, replicas=1).expand(len(tokens), -1)
    out = chunk(tokens=tokens, documents=documents, scale=scale, own=own)
    sums = out[1:].view(1 + mtp.depth, len(COLUMNS))[:, COLUMNS.index("loss_sum")]
    return out[0], sums.detach() / counts.clamp(min=1), counts


OPTIONS: list[dict[str, Any]] = [
    {"repeat": True},
    {"blocks": 2},
    {"repeat": True, "blocks": 2, "recycle": "pre_norm"},
    {"targets": "trunk"},
    {"stride": 2},
    {"stride": 3, "repeat": True},
    {"embedding": "own"},
    {"projection": "own", "targets": "trunk"},
    {"embedding": "own", "projection": "own", "repeat": True},
    {"main_loss_weight": 0.4, "loss_weight": 1.7},
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", [*VARIANTS, *OPTIONS], ids=lambda v: "-".join(str(part) for part in v.values()))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_heads_equal_the_loop(depth: int, variant: dict[str, Any], masked: bool) -> None:
    """Any trunk state will do: random ones, `after` unrelated to `before`, so that taking the wrong one shows."""
    chunk = small_model(depth, document_mask=masked, **variant)
    mtp, model = settings(chunk, **variant), chunk.model
    tokens, documents = rows(depth * mtp.stride)
    before, after = torch.randn(2, 3, 6, model.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert isinstance(chunk.mtp, SequentialHeads)
    assert model.head_dim is not None
    turn = rotation(torch.arange(6), model.head_dim, model.rope_theta)

    def feed(k: int, _: Tensor) -> Tensor:
        assert chunk.mtp is not None
        assert chunk.embedding is not None
        return (chunk.mtp.embedding(k) or chunk.embedding)(tokens[:, 1 + (k - 1) * mtp.stride :][:, :6])

    with torch.no_grad():
        assert chunk.norm is not None
        mask = document_mask(documents[:, :6]) if masked else None
        states = chunk.mtp(TrunkStates(before, after, chunk.norm), feed, turn, mask)
        for row in range(len(tokens)):
            of_row = (list(before[row]), list(after[row]), tokens[row].tolist(), documents[row].tolist(), None)
            want = loop.heads(copies(chunk), model, mtp, *of_row)
            assert len(states) == len(want) == depth
            for state, vectors in zip(states, want, strict=True):
                assert close(state[row], torch.stack(vectors), TOLERANCE)


@pytest.mark.parametrize(
    ("depth", "variant", "masked", "tie"),
    [
        (0, {}, True, True),
        *[(2, variant, True, True) for variant in [*VARIANTS, *OPTIONS]],
        *[(depth, {}, masked, tie) for depth, masked, tie in product((1, 3), (True, False), (True, False))],
    ],
)
def test_losses_and_gradients_equal_the_loop(depth: int, variant: dict[str, Any], masked: bool, tie: bool) -> None:
    chunk = small_model(depth, tie=tie, document_mask=masked, **variant)
    mtp = settings(chunk, depth_weights=[1.0, 0.5, 0.25][:depth], **variant)
    tokens, documents = rows(depth * mtp.stride)
    weights = copies(chunk)
    want, means, wanted_counts = loop.losses(weights, chunk.model, mtp, tokens.tolist(), documents.tolist())
    want.backward()
    total, losses, counts = run(chunk, mtp, tokens, documents)
    total.backward()
    assert counts.tolist() == wanted_counts
    assert all(count > 0 for count in wanted_counts)
    assert total.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert losses.tolist() == pytest.approx([mean.item() for mean in means], rel=TOLERANCE)
    assert set(weights) == {name for name, _ in chunk.named_parameters()}
    for name, p in chunk.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None and gradient.abs().max() > 1e-6, f"{name} has no influence: nothing is shown"
        assert p.grad is not None
        assert close(p.grad, gradient, TOLERANCE), name


@pytest.mark.parametrize("tie", [True, False])
def test_detached_heads_teach_themselves_alone(tie: bool) -> None:
    """Trunk, embedding and output head get the main loss's gradient, and to the bit the one that it is without MTP
    losses; the modules get theirs as ever."""
    chunk = small_model(2, tie=tie, detach=True)
    mtp = settings(chunk, decay=0.6, detach=True)
    tokens, documents = rows(2)
    weights = copies(chunk)
    want, means, _ = loop.losses(weights, chunk.model, mtp, tokens.tolist(), documents.tolist())
    own = {name: weight for name, weight in weights.items() if name.startswith("mtp.")}
    others = {name: weight for name, weight in weights.items() if name not in own}
    wanted = dict(zip(own, torch.autograd.grad(want, list(own.values()), retain_graph=True), strict=True))
    wanted |= dict(zip(others, torch.autograd.grad(means[0], list(others.values())), strict=True))
    total, _, _ = run(chunk, mtp, tokens, documents)
    total.backward()
    assert total.item() == pytest.approx(want.item(), rel=TOLERANCE)
    for name, p in chunk.named_parameters():
        assert p.grad is not None
        assert close(p.grad, wanted[name], TOLERANCE), name
    alone = {name: p.grad.clone() for name, p in chunk.named_parameters() if name in others and p.grad is not None}
    chunk.zero_grad()
    run(chunk, replace(mtp, loss_weight=0.0), tokens, documents)[0].backward()
    assert all(chunk.get_parameter(name).grad.equal(gradient) for name, gradient in alone.items())  # type: ignore[union-attr]


def test_other_documents_have_no_influence() -> None:
    """A document's losses at every depth stay, to the bit, when all tokens around it are others."""
    chunk = small_model(2)
    tokens, documents = rows(2)
    tokens, documents = tokens[1:2], documents[1:2]
    scale = torch.ones(1, 3)
    # Tokens 1 .. 4.
    inside = (documents == 1).squeeze()
    alone = documents.clone()
    alone[documents != 1] = -1
    before = chunk(tokens=tokens, documents=alone, scale=scale)
    other = torch.where(inside, tokens, (tokens + 1) % VOCABULARY)
    after = chunk(tokens=other, documents=alone, scale=scale)
    assert before[0] > 0
    assert before.equal(after)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCABULARY
    assert not before.equal(chunk(tokens=changed, documents=alone, scale=scale))
