"""Promise: a depth that reads the model's own predictions reads what the depth before it names likeliest at the same position,
where a draw says so that depends on nothing but seed, step, row of the global batch, depth and position.

Tolerance as in test_sequential.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.config.schema import MTPConfig
from mtp_dist.model import head_loss
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.head_loss import likeliest
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.training.objective import sampling_probability
from mtp_dist.training.own_tokens import Draws, own_tokens
from tests.model import loop
from tests.model.small import close, rows, small_model
from tests.model.test_sequential import TOLERANCE, copies, run, settings

VARIANTS: list[dict[str, Any]] = [
    {},
    {"recycle": "pre_norm", "h0": "pre_norm", "concat": "hidden_first"},
    {"repeat": True},
    {"stride": 2},
    {"targets": "trunk"},
    {"embedding": "own", "projection": "own"},
    {"projection": "own", "repeat": True},
    {"kind": "notebook"},
    {"kind": "notebook", "h0": "pre_norm", "repeat": True, "embedding": "own"},
]
POSITIONS = 6


def where(share: float, depth: int = 3) -> Tensor:
    return own_tokens(Draws(4, 17, share), range(3), POSITIONS, depth)


@pytest.mark.parametrize(("share", "detach"), [(0.5, False), (1.0, True)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())) or "plain")
def test_losses_and_gradients_equal_the_loop(variant: dict[str, Any], share: float, detach: bool) -> None:
    """An argmax has no gradient; the embedding of what it names has."""
    variant = variant | {"scheduled_sampling": share}
    chunk = small_model(3, detach=detach, tie=not detach, **variant)
    mtp = settings(chunk, depth_weights=[1.0, 0.5, 0.25], **variant)
    tokens, documents = rows(3 * mtp.stride)
    weights, own = copies(chunk), where(share)
    want, means, counts = loop.losses(weights, chunk.model, mtp, tokens.tolist(), documents.tolist(), own=own.tolist())
    of_heads = {name: weight for name, weight in weights.items() if name.startswith("mtp.")}
    others = {name: weight for name, weight in weights.items() if name not in of_heads}
    wanted = dict(zip(of_heads, torch.autograd.grad(want, list(of_heads.values()), retain_graph=True), strict=True))
    of_trunk = means[0] if detach else want
    wanted |= dict(zip(others, torch.autograd.grad(of_trunk, list(others.values())), strict=True))
    total, losses, found = run(chunk, mtp, tokens, documents, own)
    total.backward()
    assert found.tolist() == counts
    assert losses.tolist() == pytest.approx([mean.item() for mean in means], rel=TOLERANCE)
    assert run(chunk, mtp, tokens, documents)[1].tolist() != pytest.approx(losses.tolist(), rel=1e-3), "no token was another"
    for name, p in chunk.named_parameters():
        assert p.grad is not None
        assert close(p.grad, wanted[name], TOLERANCE), name


def test_recomputed_blocks_read_the_same_predictions() -> None:
    variant: dict[str, Any] = {"scheduled_sampling": 0.5}
    found = []
    for recompute in ("none", "selective", "full"):
        chunk = small_model(2, **variant)
        chunk.recompute = recompute
        tokens, documents = rows(2)
        run(chunk, settings(chunk, **variant), tokens, documents, where(0.5, 2))[0].backward()
        found.append({name: p.grad for name, p in chunk.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None
        assert all(gradient.equal(other[name]) for other in found[1:]), name


def test_without_the_setting_nothing_is_built() -> None:
    """And no draw is made (``Workload.gradients``): such a run costs what it did."""
    assert small_model(2).predictors is None
    assert [len(small_model(2, scheduled_sampling=p, scheduled_sampling_points=points).predictors or ()) for p, points in (
        (0.1, []), (0.0, [[100, 1.0]]), (0.0, [[100, 0.0]]))] == [2, 2, 0]  # fmt: skip


def test_a_row_draws_the_same_wherever_it_is_computed() -> None:
    """Two replicas, or micro-batches, of a global batch; fewer depths or positions change no other entry."""
    draws = Draws(seed=3, step=5, probability=0.4)
    whole = own_tokens(draws, range(16), 32, 3)
    assert torch.cat([own_tokens(draws, range(begin, begin + 4), 32, 3) for begin in range(0, 16, 4)]).equal(whole)
    assert own_tokens(draws, range(16), 32, 2).equal(whole[..., :2])
    state = torch.get_rng_state()
    own_tokens(draws, range(16), 32, 3)
    assert torch.get_rng_state().equal(state), "the run's own random state is not touched"


def test_draws_have_their_probability_and_no_pattern() -> None:
    """Of 49,152 draws, five standard deviations; rows, depths, steps and seeds differ as strangers do."""
    draws = {key: own_tokens(Draws(*key, 0.3), range(128), 128, 3).double() for key in product((1, 2), (0, 1))}
    for drawn in draws.values():
        assert drawn.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / drawn.numel()) ** 0.5)
    one = draws[1, 0]
    strangers = [draws[1, 1], draws[2, 0], one.roll(1, 0), one.roll(1, 1), one.roll(1, 2)]
    for other in strangers:
        assert ((one - 0.3) * (other - 0.3)).mean().item() == pytest.approx(0, abs=5 * 0.21 / one.numel() ** 0.5)
    assert own_tokens(Draws(1, 0, 1.0), range(8), 64, 2).all()
    assert not own_tokens(Draws(1, 0, 0.0), range(8), 64, 2).any()


def test_the_probability_follows_the_tokens() -> None:
    points: dict[str, Any] = {"scheduled_sampling": 0.2, "scheduled_sampling_points": [[100.0, 0.6], [300.0, 0.0]]}
    step, line = MTPConfig(**points), MTPConfig(**points, scheduled_sampling_shape="linear")
    assert [sampling_probability(step, tokens) for tokens in (0, 99, 100, 299, 300)] == [0.2, 0.2, 0.6, 0.6, 0.0]
    assert [sampling_probability(line, tokens) for tokens in (0, 50, 100, 200, 400)] == pytest.approx([0.2, 0.4, 0.6, 0.3, 0.0])


def test_the_likeliest_token_is_found_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the logits of all positions at once; of equal logits the first token's."""
    weight = parameter((13, 8), split=0, std=1.0, group=ALONE)
    with torch.no_grad():
        weight.copy_(torch.randn(13, 8))
        weight[7] = weight[2]
    state = torch.randn(3, 5, 8)
    state[0, 0] = 3 * weight[2].detach()
    want = (state @ weight.T).argmax(-1)
    sizes = []
    largest = head_loss._largest
    monkeypatch.setattr(head_loss, "LOGITS_IN_FLIGHT", 4 * 13)
    monkeypatch.setattr(head_loss, "_largest", lambda top, *rest: sizes.append(len(top)) or largest(top, *rest))
    found = likeliest(state, weight, ALONE)
    assert found.equal(want)
    assert found[0, 0] == 2
    assert sizes == [4, 4, 4, 3]


def test_predictors_have_no_parameters() -> None:
    chunk = small_model(2, tie=False, projection="own", scheduled_sampling=0.5)
    assert isinstance(chunk, Chunk)
    assert not [name for name, _ in chunk.named_parameters() if "predict" in name]
