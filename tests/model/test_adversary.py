"""Promise: the adversarial term is the game of its definition. Loss and all gradients equal those of loops; what a player holds
constant gets no gradient from that player's part."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.model.chunk import COLUMNS, Chunk
from mtp_dist.training.objective import coefficients
from tests.model import loop
from tests.model.small import close, rows, small_model
from tests.model.test_sequential import TOLERANCE, copies, run, settings

Weights = dict[str, Tensor]
KINDS: list[dict[str, Any]] = [
    {"kind": "sequential", "blocks": 2},
    {"kind": "sequential", "repeat": True},
    {"kind": "medusa", "blocks": 2},
    {"kind": "parallel", "branch": "final"},
]
OPTIONS: dict[str, Any] = {"targets": "trunk", "adversarial": 0.7}


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def told(inner: Tensor, score: Tensor, x: Tensor) -> Tensor:
    """v SiLU(U x), row by row."""
    total = torch.zeros((), dtype=x.dtype)
    for row, weight in zip(inner, score[0], strict=True):
        value = row @ x
        total = total + weight * value / (1 + (-value).exp())
    return total


def game(weights: Weights, chunk: Chunk, mtp: Any, tokens: Tensor, documents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of what each player minimises, by depth 1 .. D: target by target."""
    inner, score = weights["adversary.inner"], weights["adversary.score"]
    telling, fooling = ([torch.zeros((), dtype=torch.float64) for _ in range(mtp.depth)] for _ in range(2))
    for row, owners in zip(tokens.tolist(), documents.tolist(), strict=True):
        every = loop.row_states(weights, chunk.model, mtp, row, owners)[0]
        for k in range(1, mtp.depth + 1):
            for i in range(len(every[0]) - k):
                if owners[i] < 0 or len(set(owners[i : i + k + 2])) > 1:
                    continue
                true, drawn = every[0][i + k].detach(), every[k][i]
                taken = softplus(-told(inner, score, true)) + softplus(told(inner, score, drawn.detach()))
                telling[k - 1] = telling[k - 1] + taken
                fooling[k - 1] = fooling[k - 1] + softplus(-told(inner.detach(), score.detach(), drawn))
    return telling, fooling


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(part) for part in kind.values()))
def test_losses_and_gradients_equal_the_loop(kind: dict[str, Any], detach: bool) -> None:
    chunk = small_model(2, detach=detach, **kind, **OPTIONS)
    mtp = settings(chunk, depth_weights=[1.0, 0.5], **kind, **OPTIONS)
    tokens, documents = rows(2)
    weights = copies(chunk)
    assert {"adversary.inner", "adversary.score"} <= set(weights) == {name for name, _ in chunk.named_parameters()}
    want, means, counts = loop.losses(weights, chunk.model, mtp, tokens.tolist(), documents.tolist())
    telling, fooling = game(weights, chunk, mtp, tokens, documents)
    for c, count, *players in zip(coefficients(mtp, 0)[1:], counts[1:], telling, fooling, strict=True):
        want = want + mtp.adversarial * c * sum(players) / count
    own = {name: weight for name, weight in weights.items() if name.startswith(("mtp.", "adversary."))}
    others = {name: weight for name, weight in weights.items() if name not in own}
    wanted = dict(zip(own, torch.autograd.grad(want, list(own.values()), retain_graph=True), strict=True))
    of_trunk = means[0] if detach else want
    wanted |= dict(zip(others, torch.autograd.grad(of_trunk, list(others.values())), strict=True))
    total, losses, found = run(chunk, mtp, tokens, documents)
    total.backward()
    assert found.tolist() == counts
    assert total.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert losses.tolist() == pytest.approx([mean.item() for mean in means], rel=TOLERANCE), "cross-entropies alone"
    for name, p in chunk.named_parameters():
        assert wanted[name].abs().max() > 1e-6, f"{name} has no influence: nothing is shown"
        assert p.grad is not None
        assert close(p.grad, wanted[name], TOLERANCE), name
    scale = torch.zeros(len(tokens), 3)
    columns = chunk(tokens=tokens, documents=documents, scale=scale)[1:].view(3, -1)[:, COLUMNS.index("adversary_sum")]
    assert columns.tolist() == pytest.approx([0.0, *(part.item() for part in telling)], rel=TOLERANCE)


def test_each_player_holds_the_other_constant() -> None:
    """Against a discriminator that cannot tell, its loss is 2 ln 2 and the heads learn nothing from it; and heads that are frozen
    leave the discriminator its gradient."""
    chunk = small_model(2, **OPTIONS)
    tokens, documents = rows(2)
    rest = {"tokens": tokens, "documents": documents, "scale": torch.ones(len(tokens), 3)}
    chunk(**rest)[0].backward()
    assert chunk.adversary is not None
    before = chunk.adversary.inner.grad
    for name, p in chunk.named_parameters():
        p.requires_grad_(name.startswith("adversary."))
        p.grad = None
    chunk(**rest)[0].backward()
    assert before is not None and chunk.adversary.inner.grad is not None
    assert chunk.adversary.inner.grad.equal(before)
    with torch.no_grad():
        chunk.adversary.score.zero_()
    for p in chunk.parameters():
        p.requires_grad_()
    chunk.zero_grad()
    out = chunk(**rest)
    out[0].backward()
    with_game = {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}
    chunk.zero_grad()
    chunk.adversarial = 0.0
    chunk(**rest)[0].backward()
    for name, p in chunk.named_parameters():
        assert name == "adversary.score" or p.grad is None or with_game[name].equal(p.grad), name
    assert with_game["adversary.score"].any()
    table = out[1:].view(3, -1)
    for k in (1, 2):
        valid = (documents[:, : 6 - k] == documents[:, k + 1 : 7]) & (documents[:, : 6 - k] >= 0)
        assert table[k, COLUMNS.index("adversary_sum")].item() == pytest.approx(2 * math.log(2) * valid.sum().item(), rel=1e-6)
