"""Promise: parallel, Medusa, notebook and EAGLE heads compute their sources' equations: losses, counts, gradients equal those of
loops.

Tolerance as in test_sequential: all is float64 but the rotary angles and the head's logits.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch

from mtp_dist.config.heads import fused_states, taps
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.medusa import MedusaHeads
from mtp_dist.model.parameter import initialize
from tests.model import loop
from tests.model.small import close, draft_tokens, rows, small_model
from tests.model.test_sequential import TOLERANCE, copies, run, settings

KINDS: list[dict[str, Any]] = [
    {"kind": "parallel"},
    {"kind": "parallel", "branch": "final"},
    {"kind": "parallel", "blocks": 2},
    {"kind": "medusa"},
    {"kind": "medusa", "blocks": 2},
    {"kind": "notebook"},
    {"kind": "notebook", "concat": "hidden_first", "blocks": 2, "h0": "pre_norm"},
    {"kind": "notebook", "concat": "hidden_first", "repeat": True},
    {"kind": "notebook", "embedding": "own", "projection": "own"},
    {"kind": "notebook", "embedding": "own", "repeat": True, "stride": 2},
    {"kind": "sequential", "embedding": "own", "projection": "own"},
    {"kind": "parallel", "stride": 2},
    {"kind": "medusa", "stride": 3},
    {"kind": "notebook", "stride": 2},
    {"kind": "parallel", "targets": "trunk"},
    {"kind": "medusa", "targets": "trunk"},
    {"kind": "medusa", "projection": "own"},
    {"kind": "medusa", "projection": "own", "targets": "trunk"},
    {"kind": "eagle"},
    {"kind": "eagle", "targets": "trunk"},
    {"kind": "eagle", "h0": "pre_norm", "concat": "hidden_first", "targets": "trunk"},
    {"kind": "eagle", "blocks": 2, "cross_entropy_weight": 1.5},
    {"kind": "eagle3"},
    {"kind": "eagle3", "taps": [1, 2], "concat": "hidden_first", "targets": "trunk"},
    {"kind": "eagle", "draft_vocabulary": 7, "targets": "trunk"},
    {"kind": "eagle3", "draft_vocabulary": 7},
    {"kind": "eagle3", "draft_vocabulary": 5, "targets": "trunk"},
]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(part) for part in kind.values()))
def test_losses_and_gradients_equal_the_loop(kind: dict[str, Any], tie: bool, detach: bool) -> None:
    """Detached, as eagle always is: what belongs to the trunk has the main loss's gradient alone."""
    chunk = small_model(2, tie=tie, detach=detach, **kind)
    mtp = settings(chunk, depth_weights=[1.0, 0.5], **kind)
    tokens, documents = rows(2 * mtp.stride)
    weights = copies(chunk)
    assert set(weights) == {name for name, _ in chunk.named_parameters()}
    drafted = draft_tokens(mtp) if mtp.draft_vocabulary else None
    want, means, counts = loop.losses(weights, chunk.model, mtp, tokens.tolist(), documents.tolist(), drafted)
    own = {name: weight for name, weight in weights.items() if name.startswith("mtp.")}
    others = {name: weight for name, weight in weights.items() if name not in own}
    wanted = dict(zip(own, torch.autograd.grad(want, list(own.values()), retain_graph=True), strict=True))
    of_trunk = means[0] if detach or mtp.kind == "eagle" else want
    wanted |= dict(zip(others, torch.autograd.grad(of_trunk, list(others.values())), strict=True))
    total, losses, found = run(chunk, mtp, tokens, documents)
    total.backward()
    assert found.tolist() == counts
    assert total.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert losses.tolist() == pytest.approx([mean.item() for mean in means], rel=TOLERANCE)
    for name, p in chunk.named_parameters():
        assert wanted[name].abs().max() > 1e-6, f"{name} has no influence: nothing is shown"
        assert p.grad is not None
        assert close(p.grad, wanted[name], TOLERANCE), name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("projection", ["shared", "own"])
def test_a_fresh_medusa_head_is_the_main_head(projection: str, tie: bool) -> None:
    """W and b are zeros, and a projection of its own is a copy: the state of every depth is h⁰, and its logits are the main
    head's, to the bit."""
    small = small_model(2, kind="medusa", tie=tie)
    with torch.device("meta"):
        chunk = Chunk(small.model, settings(small, kind="medusa", projection=projection), range(2))
    initialize(chunk, seed=3)
    assert isinstance(chunk.mtp, MedusaHeads)
    state = torch.randn(1, 3, 8)
    assert all(module(state).equal(state) for module in chunk.mtp.values())
    own = chunk.mtp.projections()
    assert len(own) == (2 if projection == "own" else 0)
    for head in own:
        assert head.weight is not chunk.output_weight()
        assert head.weight.equal(chunk.output_weight())


@pytest.mark.parametrize(
    ("layers", "states"), [(1, (0, 1)), (2, (0, 1, 2)), (4, (1, 2, 4)), (6, (2, 4, 6)), (7, (2, 3, 4)), (32, (2, 16, 29))]
)
def test_eagle3_joins_low_middle_and_high_states(layers: int, states: tuple[int, ...]) -> None:
    """From 7 layers on those of the released code; those given, where they are."""
    model = ModelConfig(layers=layers)
    assert fused_states(model, MTPConfig(kind="eagle3")) == states
    assert taps(model, MTPConfig(kind="eagle3")) == tuple(state for state in states if state < layers)
    assert fused_states(model, MTPConfig(kind="eagle3", taps=[0, layers])) == (0, layers)


@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [3, 0], [1, 1, 1, 0], [2, 1, 0]])
@pytest.mark.parametrize("kind", [*KINDS[:2], {"kind": "eagle3"}], ids=lambda kind: kind["kind"] + kind.get("branch", ""))
def test_a_tap_travels_from_chunk_to_chunk(kind: dict[str, Any], sizes: list[int]) -> None:
    """Chunks in a row, whatever the cut, have the whole model's loss and gradients; only where the tap must travel is an edge
    wider than one state."""
    whole = small_model(2, layers=3, **kind)
    mtp, ends = settings(whole, **kind), [sum(sizes[: i + 1]) for i in range(len(sizes))]
    values, chunks = dict(whole.named_parameters()), []
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        chunk = Chunk(whole.model, mtp, range(end - size, end), first=number == 0, last=end == 3 and number == len(sizes) - 1)
        chunk.double().load_state_dict({name: values[name].detach() for name in chunk.state_dict()})
        chunks.append(chunk)
    tokens, documents = rows(2)
    rest = {"tokens": tokens, "documents": documents, "scale": torch.ones(3, 3)}
    hidden = None
    for (chunk, following), end in zip(pairwise(chunks), ends, strict=False):
        hidden = chunk(hidden, **rest)
        assert chunk.states_out == following.states_in == hidden.shape[-1] // 8
        assert chunk.states_out == 1 + sum(tap < end for tap in taps(whole.model, mtp))
    loss, want = chunks[-1](hidden, **rest)[0], whole(**rest)[0]
    loss.backward()
    want.backward()
    assert loss.equal(want)
    for name, value in values.items():
        parts = [p.grad for chunk in chunks for other, p in chunk.named_parameters() if other == name and p.grad is not None]
        assert value.grad is not None
        assert close(torch.stack(parts).sum(0), value.grad, TOLERANCE), name
