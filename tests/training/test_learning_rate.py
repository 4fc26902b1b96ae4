"""Promise: the rate is a pure function of trained tokens: a linear warm-up from the first step on, then the named shape."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config.schema import ScheduleConfig
from mtp_dist.training.learning_rate import learning_rate

PEAK, TOTAL = 0.5, 1000


def rate(tokens: int, **schedule: object) -> float:
    return learning_rate(ScheduleConfig(**schedule), PEAK, tokens, TOTAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(kind: str) -> None:
    for tokens in (1, 10, 50, 99):
        assert rate(tokens, kind=kind, warmup_tokens=100) == pytest.approx(PEAK * tokens / 100)
    assert rate(100, kind=kind, warmup_tokens=100) == pytest.approx(PEAK)
    assert rate(1, kind=kind) == pytest.approx(PEAK, rel=1e-4), "without a warm-up the first step is not lost"


def test_cosine_passes_its_middle_and_ends_at_the_least() -> None:
    assert rate(550, kind="cosine", warmup_tokens=100, min_ratio=0.1) == pytest.approx(PEAK * (0.1 + 0.9 * 0.5))
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rate(325, kind="cosine", warmup_tokens=100, min_ratio=0.1) == pytest.approx(PEAK * quarter)
    assert rate(TOTAL, kind="cosine", warmup_tokens=100, min_ratio=0.1) == pytest.approx(PEAK * 0.1)
    assert rate(TOTAL, kind="cosine", min_ratio=0.0) == pytest.approx(0.0, abs=1e-15)


def test_wsd_is_flat_then_linear() -> None:
    wsd = {"kind": "wsd", "warmup_tokens": 100, "decay_tokens": 200, "min_ratio": 0.2}
    for tokens in (100, 500, 799, 800):
        assert rate(tokens, **wsd) == PEAK
    assert rate(900, **wsd) == pytest.approx(PEAK * 0.6)
    assert rate(TOTAL, **wsd) == pytest.approx(PEAK * 0.2)
    assert rate(900, kind="wsd", min_ratio=0.2) == pytest.approx(PEAK * 0.6), "null decay_tokens: a fifth of the run"


def test_constant_stays() -> None:
    assert {rate(tokens, kind="constant", warmup_tokens=100) for tokens in (100, 555, TOTAL, 2 * TOTAL)} == {PEAK}


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(0, 999),
    st.floats(0, 1),
    st.integers(1, 999),
    st.integers(1, 3000),
)
def test_between_nothing_and_the_peak_and_never_rising_after_it(
    kind: str, warmup: int, least: float, decay: int, tokens: int
) -> None:
    schedule = {"kind": kind, "warmup_tokens": warmup, "min_ratio": least, "decay_tokens": min(decay, TOTAL - warmup)}
    here, after = rate(tokens, **schedule), rate(tokens + 1, **schedule)
    assert 0 <= here <= PEAK * (1 + 1e-12)
    if tokens >= warmup:
        assert after <= here * (1 + 1e-12)
        assert here >= PEAK * least * (1 - 1e-12)
