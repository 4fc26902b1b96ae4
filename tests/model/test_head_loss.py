"""Promise: the chunked head loses nothing. Loss, statistics and gradients equal whole logits and autograd, for any chunk size.

Tolerance: logits and sums are float32; 1e-5 of a tensor's largest element is a hundred units of the last place. bfloat16 (8 bits)
rounds a logit of up to 16 by up to 2^-5, which moves its probability, and so a gradient, by 3 %: 2^-4 of the largest element.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.model import head_loss as module
from mtp_dist.model.head_loss import STATISTICS, Teacher, head_loss
from mtp_dist.model.targets import IGNORE
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.model.weight_gradients import WeightGradients
from tests.model.small import close

ROWS, POSITIONS, WIDTH, VOCABULARY, DEPTHS = 3, 9, 8, 29, 3
TOLERANCE = 1e-5
BFLOAT16 = 2**-4


def case(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], nn.Parameter, Tensor, Tensor]:
    """States that get most of the targets right; a depth-dependent part of the targets is valid."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    wanted = torch.randint(0, VOCABULARY, (ROWS, POSITIONS, DEPTHS), generator=generator)
    noise = torch.randn(DEPTHS, ROWS, POSITIONS, WIDTH, generator=generator)
    states = [(F.embedding(wanted[..., k], weight) * 1.2 + noise[k]).to(dtype).requires_grad_() for k in range(DEPTHS)]
    hidden = torch.rand(ROWS, POSITIONS, DEPTHS, generator=generator) < torch.tensor([0.1, 0.2, 0.3])
    scale = torch.rand(ROWS, DEPTHS, generator=generator)
    return states, nn.Parameter(weight.to(dtype)), wanted.masked_fill(hidden, IGNORE), scale


def whole(states: list[Tensor], weight: Tensor, wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Full logits in float64."""
    logits = torch.stack([state.double() @ weight.double().T for state in states], dim=2)
    losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), ignore_index=IGNORE, reduction="none").view(wanted.shape)
    valid = wanted != IGNORE
    right = (logits.argmax(-1) == wanted) & valid
    table = torch.zeros(len(states), 4, dtype=torch.float64)
    for b in range(wanted.shape[0]):
        for i in range(wanted.shape[1]):
            for k in range(len(states)):
                if not valid[b, i, k]:
                    continue
                earlier = all(right[b, i, :k].tolist())
                table[k] += torch.tensor([losses[b, i, k].item(), right[b, i, k], earlier and right[b, i, k], earlier])
    return (losses * scale.double().unsqueeze(1)).sum(), table


def soft_case(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], nn.Parameter, Tensor, Tensor]:
    """As ``case``, where depth k often names what the main head does k positions on, which are not counted past the last one."""
    states, weight, wanted, scale = case(dtype)
    generator = torch.Generator().manual_seed(4)
    for k in range(1, DEPTHS):
        noise = torch.randn(ROWS, POSITIONS, WIDTH, generator=generator)
        states[k] = (states[0].detach().float().roll(-k, 1) + noise).to(dtype).requires_grad_()
        wanted[:, POSITIONS - k :, k] = IGNORE
    return states, weight, wanted, scale


def soft_loop(states: list[Tensor], weight: Tensor, wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Target by target in float64: -sum_v p(v) log q(v), p the main head k positions on, without a gradient."""
    total, table = torch.zeros((), dtype=torch.float64), torch.zeros(len(states), 4, dtype=torch.float64)
    for b in range(wanted.shape[0]):
        for i in range(wanted.shape[1]):
            agreed = True
            for k in range(len(states)):
                if wanted[b, i, k] == IGNORE:
                    agreed = agreed and k == 0
                    continue
                said = (weight.double() @ states[k][b, i].double()).log_softmax(0)
                if k == 0:
                    loss, right = -said[wanted[b, i, 0]], said.argmax() == wanted[b, i, 0]
                    table[0] += torch.tensor([loss.item(), right, right, 1])
                else:
                    taught = (weight.detach().double() @ states[0][b, i + k].detach().double()).softmax(0)
                    loss, right = -(taught * said).sum(), said.argmax() == taught.argmax()
                    table[k] += torch.tensor([loss.item(), right, right and agreed, agreed])
                    agreed = agreed and bool(right)
                total = total + scale[b, k].double() * loss
    return total, table


def soft(states: list[Tensor], weight: nn.Parameter, wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return head_loss(states, weight, wanted, scale, ALONE, None, teacher=Teacher(states[0], weight))


@pytest.mark.parametrize("in_flight", [1, 2 * VOCABULARY, 11 * VOCABULARY, 1 << 22], ids=["1", "2 and 1", "11 and 5", "all"])
def test_soft_targets_equal_the_loop(monkeypatch: pytest.MonkeyPatch, in_flight: int) -> None:
    """For any chunk: also such as end within a row, or hold the last positions of one and the first of another."""
    monkeypatch.setattr(module, "LOGITS_IN_FLIGHT", in_flight)
    states, weight, wanted, scale = soft_case()
    inputs = [*states, weight]
    want, table = soft_loop(*soft_case())
    reference = soft_case()
    right = torch.autograd.grad(soft_loop(*reference)[0], [*reference[0], reference[1]])
    got, statistics = soft(states, weight, wanted, scale)
    assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert statistics[:, 0].tolist() == pytest.approx(table[:, 0].tolist(), rel=TOLERANCE)
    assert statistics[:, 1:].tolist() == table[:, 1:].tolist()
    for a, b in zip(torch.autograd.grad(got, inputs), right, strict=True):
        assert close(a, b, TOLERANCE)
    for k in range(1, DEPTHS):
        valid = (wanted[..., k] != IGNORE).sum()
        assert 0 < table[k, 2] < table[k, 1] < valid or k == 1, "some drafts agree, fewer with all before them"
        assert 0 < table[k, 1] < valid


def test_a_teacher_gets_no_gradient() -> None:
    """The main head's state and the matrix have, to the bit, what they have where the depths' losses weigh nothing, or where
    the teacher is another one; and the depths' states do see the teacher."""
    states, weight, wanted, scale = soft_case()
    only_main = scale.clone()
    only_main[:, 1:] = 0
    frozen = [states[0], *(state.detach() for state in states[1:])]
    alone = torch.autograd.grad(soft(frozen, weight, wanted, only_main)[0], [states[0]])[0]
    assert torch.autograd.grad(soft(states, weight, wanted, scale)[0], [states[0]])[0].equal(alone)
    other = Teacher(states[0].flip(0), nn.Parameter(weight.detach().flip(0)))
    got = head_loss(states, weight, wanted, scale, ALONE, None, teacher=other)[0]
    gradients = torch.autograd.grad(got, [*states, other.weight], allow_unused=True)
    assert gradients[0].equal(alone) and gradients[-1] is None
    mine = torch.autograd.grad(soft(states, weight, wanted, scale)[0], states[1:])
    assert not any(a.equal(b) for a, b in zip(gradients[1:-1], mine, strict=True))
    (matrix,) = torch.autograd.grad(
        head_loss(states, weight, wanted, scale, ALONE, None, main_only=True, teacher=other)[0], [weight]
    )
    assert matrix.equal(torch.autograd.grad(soft(frozen, weight, wanted, only_main)[0], [weight])[0])


def test_a_depth_that_says_what_its_teacher_says_learns_nothing() -> None:
    """Its loss is then the teacher's entropy, and agreement is full."""
    states, weight, wanted, scale = soft_case()
    states[1] = states[0].detach().roll(-1, 1).requires_grad_()
    loss, statistics = soft(states, weight, wanted, scale)
    assert torch.autograd.grad(loss, [states[1]])[0].abs().max() < 1e-6
    said = (states[0].detach().double() @ weight.detach().double().T).log_softmax(-1)
    entropy = -(said.exp() * said).sum(-1).roll(-1, 1)[wanted[..., 1] != IGNORE]
    assert statistics[1, 0].item() == pytest.approx(entropy.sum().item(), rel=TOLERANCE)
    assert statistics[1, 1:].tolist() == [len(entropy)] * 3


def test_soft_targets_in_bfloat16() -> None:
    states, weight, wanted, scale = soft_case(torch.bfloat16)
    reference = soft_case(torch.bfloat16)
    want = soft_loop(*reference)[0]
    got = soft(states, weight, wanted, scale)[0]
    assert got.item() == pytest.approx(want.item(), rel=BFLOAT16)
    right = torch.autograd.grad(want, [*reference[0], reference[1]])
    for a, b in zip(torch.autograd.grad(got, [*states, weight]), right, strict=True):
        assert a.dtype == torch.bfloat16
        assert close(a, b.double(), BFLOAT16)


def both(
    states: list[Tensor], weight: nn.Parameter, wanted: Tensor, scale: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(got, want) gradients of the states and the weight, loss, statistics."""
    inputs = [*states, weight]
    want, want_statistics = whole(states, weight, wanted, scale)
    right = torch.autograd.grad(want, inputs)
    got, statistics = head_loss(states, weight, wanted, scale, ALONE, None)
    assert got.dtype == statistics.dtype == torch.float32
    gradients = torch.autograd.grad(got, inputs)
    return list(zip(gradients, right, strict=True)), (got, want), (statistics, want_statistics)


@pytest.mark.parametrize("in_flight", [1, 2 * VOCABULARY, 5 * VOCABULARY + 3, 1 << 22], ids=["1", "2", "5", "all"])
def test_equals_whole_logits_for_any_chunk(monkeypatch: pytest.MonkeyPatch, in_flight: int) -> None:
    """Chunks of 1, 2 and 5 positions, and all 27 at once."""
    monkeypatch.setattr(module, "LOGITS_IN_FLIGHT", in_flight)
    gradients, (got, want), (statistics, right) = both(*case())
    assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
    assert statistics[:, 0].tolist() == pytest.approx(right[:, 0].tolist(), rel=TOLERANCE)
    assert statistics[:, 1:].tolist() == right[:, 1:].tolist()
    for a, b in gradients:
        assert close(a, b, TOLERANCE)


def test_the_case_tells_the_statistics_apart() -> None:
    """Some right and some wrong at every depth, and a prefix that matters: else equality would show little."""
    _, (correct, prefix_correct, prefix_valid) = whole(*case())[1][:, 0], whole(*case())[1][:, 1:].T
    valid = (case()[2] != IGNORE).sum((0, 1))
    assert STATISTICS == ("loss_sum", "correct", "prefix_correct", "prefix_valid")
    for k in range(DEPTHS):
        assert 0 < correct[k] < valid[k]
        assert k == 0 or 0 < prefix_correct[k] < prefix_valid[k] < valid[k]
    assert prefix_correct[0] == correct[0]


def test_bfloat16() -> None:
    gradients, (got, want), _ = both(*case(torch.bfloat16))
    assert got.item() == pytest.approx(want.item(), rel=BFLOAT16)
    for a, b in gradients:
        assert a.dtype == torch.bfloat16
        assert close(a, b.double(), BFLOAT16)


@pytest.mark.parametrize("empty", [[1], [0, 2], [0, 1, 2]])
def test_depths_without_a_valid_target_count_nothing_and_are_finite(empty: list[int]) -> None:
    states, weight, wanted, scale = case()
    wanted[..., empty] = IGNORE
    scale[:, empty] = 0  # what target_scale gives where nothing counts
    gradients, (got, want), (statistics, _) = both(states, weight, wanted, scale)
    assert got.item() == pytest.approx(want.item(), rel=TOLERANCE, abs=0)
    assert statistics[empty].eq(0).all()
    for k, (gradient, right) in enumerate(gradients):
        assert close(gradient, right, TOLERANCE) or (right.eq(0).all() and gradient.eq(0).all())
        assert k not in empty or gradient.eq(0).all()


def test_the_upstream_gradient_scales_all() -> None:
    states, weight, wanted, scale = case()
    inputs = [*states, weight]
    once = torch.autograd.grad(head_loss(states, weight, wanted, scale, ALONE, None)[0], inputs)
    thrice = torch.autograd.grad(3 * head_loss(states, weight, wanted, scale, ALONE, None)[0], inputs)
    for a, b in zip(once, thrice, strict=True):
        assert close(b, 3 * a.double(), 1e-6)


def test_finite_differences() -> None:
    """Not autograd against autograd: the loss itself, moved along random directions (steps of 1e-2, as float32 needs)."""
    states, weight, wanted, scale = case()
    inputs = [*states, weight]
    gradients = torch.autograd.grad(head_loss(states, weight, wanted, scale, ALONE, None)[0], inputs)
    generator = torch.Generator().manual_seed(9)
    for i in range(len(inputs)):
        direction = torch.randn(inputs[i].shape, generator=generator)
        values = []
        for step in (1e-2, -1e-2):
            moved = [x.detach() + step * direction if j == i else x.detach() for j, x in enumerate(inputs)]
            values.append(head_loss(moved[:-1], nn.Parameter(moved[-1]), wanted, scale, ALONE, None)[0].item())
        slope = (gradients[i] * direction).sum().item()
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_what_needs_no_gradient_gets_none() -> None:
    """A frozen head still hands the states their gradient, frozen states still teach the head, evaluation computes neither."""
    states, weight, wanted, scale = case()
    want = torch.autograd.grad(head_loss(states, weight, wanted, scale, ALONE, None)[0], [*states, weight])
    frozen = nn.Parameter(weight.detach(), requires_grad=False)
    for a, b in zip(torch.autograd.grad(head_loss(states, frozen, wanted, scale, ALONE, None)[0], states), want, strict=False):
        assert a.equal(b)
    loss, statistics = head_loss([s.detach() for s in states], weight, wanted, scale, ALONE, None)
    (only,) = torch.autograd.grad(loss, [weight])
    assert only.equal(want[-1])
    with torch.no_grad():
        again, same = head_loss(states, weight, wanted, scale, ALONE, None)
    assert not again.requires_grad
    assert again.equal(loss) and same.equal(statistics)


def test_a_queue_holds_the_weight_gradient_back() -> None:
    states, weight, wanted, scale = case()
    want = torch.autograd.grad(head_loss(states, weight, wanted, scale, ALONE, None)[0], [weight])[0]
    queue = WeightGradients()
    head_loss(states, weight, wanted, scale, ALONE, queue)[0].backward()
    assert weight.grad is None
    assert all(state.grad is not None for state in states)
    queue.take()()
    assert weight.grad is not None
    assert weight.grad.equal(want)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter needs a gradient for an autograd Function even where gradients are off: the loss must be told."""
    asked: list[bool] = []
    chunk = module._chunk
    monkeypatch.setattr(module, "_chunk", lambda *arguments: (asked.append(arguments[3] is not None), chunk(*arguments))[1])
    weight, states = torch.nn.Parameter(torch.randn(7, 4)), [torch.randn(2, 3, 4)]
    wanted, scale = torch.randint(0, 7, (2, 3, 1)), torch.ones(2, 1)
    with torch.no_grad():
        module.head_loss(states, weight, wanted, scale, ALONE, None)
    module.head_loss(states, weight, wanted, scale, ALONE, None)
    assert asked == [False, True]
