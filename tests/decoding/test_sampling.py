"""Temperature, top-k and top-p make the distribution that their definitions say."""

import pytest
import torch

from mtp_dist.decoding.sampling import draw, probabilities

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 0, 1.0), [0.5, 0.2, 0.15, 0.1, 0.05]),
        ((1.0, 2, 1.0), [5 / 7, 2 / 7, 0, 0, 0]),
        ((1.0, 9, 1.0), [0.5, 0.2, 0.15, 0.1, 0.05]),
        ((1.0, 0, 0.49), [1, 0, 0, 0, 0]),
        ((1.0, 0, 0.6), [5 / 7, 2 / 7, 0, 0, 0]),
        ((1.0, 0, 1e-9), [1, 0, 0, 0, 0]),
        # top-p acts on what top-k left: 5/7 alone holds 0.7 there, but not of the whole distribution.
        ((1.0, 2, 0.7), [1, 0, 0, 0, 0]),
        ((0.5, 0, 1.0), [25 / 32.5, 4 / 32.5, 2.25 / 32.5, 1 / 32.5, 0.25 / 32.5]),
        ((1e-4, 0, 1.0), [1, 0, 0, 0, 0]),
    ],
)
def test_probabilities_by_hand(settings: tuple[float, int, float], expected: list[float]) -> None:
    torch.testing.assert_close(probabilities(LOGITS, *settings), torch.tensor(expected, dtype=torch.float64))


def test_order_of_tokens_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    for settings in ((0.7, 3, 0.9), (1.3, 0, 0.8), (1.0, 4, 1.0)):
        torch.testing.assert_close(probabilities(LOGITS[order], *settings), probabilities(LOGITS, *settings)[order])


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert probabilities(torch.zeros(2, 6), 1.0, 4).tolist() == [[0.25, 0.25, 0.25, 0.25, 0, 0]] * 2


def test_a_tiny_temperature_does_not_overflow() -> None:
    result = probabilities(torch.tensor([3e4, -3e4, 2e4]), 1e-30, 0, 0.9)
    assert result.tolist() == [1, 0, 0]


def test_a_seed_repeats_the_draws() -> None:
    distribution = torch.rand(50, 9, generator=torch.Generator().manual_seed(0))
    first, again, other = (draw(distribution, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other
