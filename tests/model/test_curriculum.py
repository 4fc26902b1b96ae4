"""Promise: a depth that is off is not computed, and the others are what they would be beside one of weight 0."""

import copy
from typing import Any

import pytest
import torch

from mtp_dist.model.chunk import Chunk
from mtp_dist.model.head_loss import STATISTICS
from tests.model.small import close, rows, small_model
from tests.model.test_kinds import KINDS

DEPTH = 3


@pytest.mark.parametrize("computed", [0, 1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "sequential"},
        {"kind": "sequential", "detach": True},
        {"kind": "sequential", "targets": "trunk", "adversarial": 0.5},
        *KINDS,
    ],
    ids=lambda kind: "-".join(str(part) for part in kind.values()),
)
def test_a_depth_that_is_off_costs_nothing(kind: dict[str, Any], computed: int) -> None:
    whole = small_model(DEPTH, **kind)
    cut: Chunk = copy.deepcopy(whole)
    cut.compute(computed)
    assert whole.mtp is not None and cut.mtp is not None
    calls = dict.fromkeys(cut.mtp, 0)

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name, module in cut.mtp.items():
        module.register_forward_hook(count(name))
    tokens, documents = rows(DEPTH * kind.get("stride", 1))
    scale = torch.tensor([1.0, 0.5, 0.25, 0.125]) * (torch.arange(1 + DEPTH) <= computed)
    everything = torch.tensor([1.0, 0.5, 0.25, 0.125])
    want = whole(tokens=tokens, documents=documents, scale=scale.expand(3, -1))
    got = cut(tokens=tokens, documents=documents, scale=everything.expand(3, -1))
    assert got.shape == want.shape == (whole.result_size(),)
    assert close(got[:1], want[:1].double(), 1e-6)
    found, wanted = (result[1:].view(1 + DEPTH, -1).detach() for result in (got, want))
    assert found[: 1 + computed].equal(wanted[: 1 + computed])
    assert not found[1 + computed :].any() and wanted[:, STATISTICS.index("loss_sum")].all()
    used = {name: computed if len(calls) == 1 else int(int(name) <= computed) for name in calls}
    assert calls == used
    want[0].backward()
    got[0].backward()
    for name, p in cut.named_parameters():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        module = name.split(".")[1]
        if not (used[module] if name.startswith("mtp.") else computed or not name.startswith("adversary.")):
            assert p.grad is None and not gradient.any(), name
        else:
            assert p.grad is not None and close(p.grad, gradient, 1e-6), name
    cut.compute(DEPTH)
    scale = everything.expand(3, -1)
    assert cut(tokens=tokens, documents=documents, scale=scale).equal(whole(tokens=tokens, documents=documents, scale=scale))
