"""Verification keeps the trunk's distribution whatever the drafts are, and a verifier that is wrong is found out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtp_dist.decoding import verification
from mtp_dist.decoding.sampling import draw, probabilities
from mtp_dist.decoding.verification import verify_greedy, verify_sampled, verify_typical
from tests.decoding.chi_square import excess

V, GAMMA, ROWS = 4, 2, 100_000


def tables(seed: int, settings: tuple[float, int, float]) -> list[Tensor]:
    """Distributions of token 1, of token 2 given token 1, of token 3 given both: shapes [V], [V, V], [V, V, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn((V,) * (i + 1), generator=generator, dtype=torch.float64) for i in range(GAMMA + 1)]
    return [probabilities(rows, *settings) for rows in logits]


def joint(p: list[Tensor]) -> Tensor:
    """[V, V, V]: the probability of each text of three tokens, by enumeration."""
    return p[0][:, None, None] * p[1][:, :, None] * p[2]


def along(table: list[Tensor], drafts: Tensor, depths: int) -> Tensor:
    """[ROWS, depths, V]: the distribution of each next token after the drafts before it."""
    rows = [table[0].expand(len(drafts), V), table[1][drafts[:, 0]], table[2][drafts[:, 0], drafts[:, 1]]]
    return torch.stack(rows[:depths], dim=1)


def texts(p: list[Tensor], q: list[Tensor] | None, seed: int) -> Tensor:
    """ROWS texts of three tokens: one round of speculative decoding; where it gave fewer, plain draws from p follow."""
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.empty(ROWS, 0, dtype=torch.int64)
    for depth in range(GAMMA):
        if q is None:
            new = torch.full((ROWS,), depth + 1)
        else:
            new = draw(q[0].expand(ROWS, V) if depth == 0 else q[1][drafts[:, 0]], generator)
        drafts = torch.cat((drafts, new.unsqueeze(1)), dim=1)
    verdict = verify_sampled(drafts, along(p, drafts, GAMMA + 1), None if q is None else along(q, drafts, GAMMA), generator)
    text = torch.cat((drafts, drafts[:, :1]), dim=1)
    text[torch.arange(ROWS), verdict.accepted] = verdict.token
    for position in range(1, GAMMA + 1):
        plain = draw(p[1][text[:, 0]] if position == 1 else p[2][text[:, 0], text[:, 1]], generator)
        text[:, position] = torch.where(verdict.accepted < position, plain, text[:, position])
    return text


def deviation(p: list[Tensor], q: list[Tensor] | None, seed: int) -> float:
    text = texts(p, q, seed)
    counts = torch.bincount(text @ torch.tensor([V * V, V, 1]), minlength=V**3)
    return excess(counts, joint(p).flatten() * ROWS)


PLAIN, CUT = (1.0, 0, 1.0), (0.7, 3, 0.9)


@pytest.mark.parametrize("settings", [PLAIN, CUT, (1.5, 2, 1.0)], ids=["temperature_1", "all_three", "top_k"])
@pytest.mark.parametrize("drafts", ["from_q", "certain", "from_p"])
def test_texts_are_distributed_as_the_trunk_alone_would_write_them(settings: tuple[float, int, float], drafts: str) -> None:
    p = tables(1, settings)
    q = {"from_q": tables(2, settings), "certain": None, "from_p": p}[drafts]
    assert deviation(p, q, seed=3) < 1


BROKEN: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "accepts everything": ("acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0])),
    "accepts with p": ("acceptance", lambda drafts, p, q: p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)),
    "ratio upside down": ("acceptance", lambda drafts, p, q: (q / p).gather(-1, drafts.unsqueeze(-1)).squeeze(-1)),
    "replaces from p": ("residual", lambda p, q: p),
    "replaces from |p - q|": ("residual", lambda p, q: (p - q).abs()),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_same_test_finds_a_broken_verifier(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function = BROKEN[fault]
    monkeypatch.setattr(verification, name, function)
    assert deviation(tables(1, PLAIN), tables(2, PLAIN), seed=3) > 1


def test_typical_acceptance_by_hand() -> None:
    sure, even = [0.9, 0.06, 0.04, 0.0], [0.25, 0.25, 0.25, 0.25]
    p = torch.tensor([[sure, even, even]] * 3, dtype=torch.float64)
    drafts = torch.tensor([[0, 1], [1, 1], [2, 1]])
    # Bounds: min(0.05, 0.3 exp(-0.39)) = 0.05 where the trunk is sure, min(0.05, 0.3 / 4) = 0.05 where it is not.
    assert verify_typical(drafts, p, 0.05, 0.3, None).accepted.tolist() == [2, 2, 0]
    # 0.2 and 0.3 / 4; then 0.5 and 1.2 / 4.
    assert verify_typical(drafts, p, 0.2, 0.3, None).accepted.tolist() == [2, 0, 0]
    assert verify_typical(drafts, p, 0.5, 1.2, None).accepted.tolist() == [1, 0, 0]
    assert verify_typical(drafts, p, 0.05, 0.3, None, torch.tensor([1, 0, 2])).accepted.tolist() == [1, 0, 0]
    assert verify_typical(drafts[:1], torch.eye(4).double()[[0, 1, 3]].unsqueeze(0), 0.1, 0.3, None).token.tolist() == [3]


def test_drafts_from_the_trunks_own_distribution_are_never_rejected() -> None:
    p = torch.rand(1000, 4, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    drafts = draw(p[:, :-1], torch.Generator().manual_seed(1))
    verdict = verify_sampled(drafts, p, p[:, :-1], torch.Generator().manual_seed(2))
    assert verdict.accepted.tolist() == [3] * 1000


def test_greedy_keeps_the_longest_right_prefix_then_the_argmax() -> None:
    best = torch.tensor([[5, 6, 7, 8]] * 5)
    drafts = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 0, 7], [0, 6, 7], [0, 0, 0]])
    logits = torch.nn.functional.one_hot(best, 9).double()
    verdict = verify_greedy(drafts, logits)
    assert verdict.accepted.tolist() == [3, 2, 1, 0, 0]
    assert verdict.token.tolist() == [8, 7, 6, 5, 5]
    assert verify_greedy(drafts[:, :0], logits[:, :1]).token.tolist() == [5] * 5
