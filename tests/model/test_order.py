"""Promise: token order prediction is ListNet on the paper's scores. Loss and all gradients equal those of plain loops over a
whole vocabulary of scores, float64.

Tolerance as in test_sequential: all is float64 but the shares, rotary angles and the head's logits.
"""

import pytest
import torch
from torch import Tensor

from mtp_dist.config.heads import lookahead
from mtp_dist.model import head_loss
from mtp_dist.model.chunk import COLUMNS
from mtp_dist.model.targets import targets, upcoming, valid_counts
from mtp_dist.training.objective import coefficients, target_scale
from tests.model import loop
from tests.model.small import VOCABULARY, close, rows, small_model
from tests.model.test_sequential import TOLERANCE, copies, settings

WINDOWS = [2, 3, 7]


def score(row: list[int], owners: list[int], i: int, window: int) -> list[float]:
    """W - d for each token of the vocabulary, d its distance behind the next token; -inf where it is not in the window."""
    found = [float("-inf")] * VOCABULARY
    for d in reversed(range(window)):
        place = i + 1 + d
        if owners[i] >= 0 and owners[place] == owners[i]:
            found[row[place]] = float(window - d)
    return found


def ranking(weights: dict[str, Tensor], state: Tensor, scores: list[float]) -> Tensor:
    """ListNet: -sum_v softmax(score)_v log softmax(logits)_v."""
    logits = weights["mtp.1.head.weight"] @ state
    wanted = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return -sum(p * (logit - logits.exp().sum().log()) for p, logit in zip(wanted, logits, strict=True) if p)  # type: ignore[return-value]


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_losses_and_gradients_equal_the_loop(window: int, tie: bool, detach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of two positions, so that a chunk ends inside a row."""
    monkeypatch.setattr(head_loss, "LOGITS_IN_FLIGHT", 2 * VOCABULARY)
    chunk = small_model(1, tie=tie, kind="top", window=window, detach=detach)
    mtp, model = settings(chunk, kind="top", window=window, detach=detach), chunk.model
    tokens, documents = rows(window - 1)
    tokens[0, 2:5] = tokens[0, 2]  # a token that comes again counts once, where it is nearest
    weights = copies(chunk)
    assert set(weights) == {name for name, _ in chunk.named_parameters()}
    head = weights["embedding.weight"] if tie else weights["head.weight"]
    sums, counts, right = [torch.zeros((), dtype=torch.float64) for _ in range(2)], [0, 0], 0
    for row, owners in zip(tokens.tolist(), documents.tolist(), strict=True):
        hidden = loop.trunk_states(weights, model, row[:6], owners[:6])[-1]
        for i, state in enumerate(loop.norm(x, weights["norm.weight"], model.norm_eps) for x in hidden):
            if owners[i] < 0 or owners[i + 1] != owners[i]:
                continue
            sums[0] = sums[0] + (head @ state).exp().sum().log() - (head @ state)[row[i + 1]]
            counts[0] += 1
            if owners[i + 2] == owners[i]:
                sums[1] = sums[1] + ranking(weights, state, score(row, owners, i, window))
                right += int((weights["mtp.1.head.weight"] @ state).argmax()) == row[i + 1]
                counts[1] += 1
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    want = means[0] + mtp.loss_weight * means[1]
    own = {name: weight for name, weight in weights.items() if name.startswith("mtp.")}
    others = {name: weight for name, weight in weights.items() if name not in own}
    wanted = dict(zip(own, torch.autograd.grad(want, list(own.values()), retain_graph=True), strict=True))
    of_trunk = means[0] if detach else want
    wanted |= dict(zip(others, torch.autograd.grad(of_trunk, list(others.values())), strict=True))

    found = valid_counts(targets(tokens, documents, 1, ahead=lookahead(mtp)))
    assert found.tolist() == counts
    out = chunk(tokens=tokens, documents=documents, scale=target_scale(coefficients(mtp, 0), found, replicas=1).expand(3, -1))
    out[0].backward()
    assert out[0].item() == pytest.approx(want.item(), rel=TOLERANCE)
    columns = out[1:].detach().view(2, -1)
    assert columns[:, COLUMNS.index("loss_sum")].tolist() == pytest.approx([total.item() for total in sums], rel=TOLERANCE)
    assert columns[1, COLUMNS.index("correct")] == right
    for name, p in chunk.named_parameters():
        assert wanted[name].abs().max() > 1e-6, f"{name} has no influence: nothing is shown"
        assert p.grad is not None
        assert close(p.grad, wanted[name], TOLERANCE), name


def test_a_window_of_sixteen_stands_for_a_long_one() -> None:
    """As float32 sums show it: what is further ahead has no share beside the next token's."""
    tokens = torch.arange(1, 81).unsqueeze(0)
    documents = torch.zeros_like(tokens)
    short, long = (upcoming(tokens[:, : 16 + window], documents[:, : 16 + window], window)[1] for window in (16, 64))
    assert (long[..., :16] - short).abs().max() < 2e-7
    assert long[..., 16:].sum(-1).max() < 2e-7
    assert long.sum(-1).sub(1).abs().max() < 1e-6
