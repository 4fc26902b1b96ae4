"""Counts become the ratios that are shown, and nothing is made up where there is nothing to divide by."""

from mtp_dist.decoding.statistics import Statistics, total


def test_ratios_by_hand() -> None:
    statistics = Statistics(prompt_tokens=3, tokens=1)
    # Drafts of 3, 3 and 1 (the text nearly full); accepted 3, 1 and 1.
    for drafted, accepted in ((3, 3), (3, 1), (1, 1)):
        statistics.count(drafted, accepted, accepted + 1)
    statistics.seconds = 2.0
    assert statistics.drafted == [3, 2, 2]
    assert statistics.reached == [3, 2, 1]
    assert statistics.accepted == [3, 1, 1]
    assert statistics.acceptance == [1, 1 / 2, 1 / 2]
    assert statistics.conditional_acceptance == [1, 1 / 2, 1]
    assert statistics.histogram == [0, 0, 2, 0, 1]
    assert statistics.tokens == 9
    assert statistics.tokens_per_forward == 8 / 3
    assert statistics.tokens_per_second == 4


def test_a_text_of_one_token_has_no_ratios() -> None:
    statistics = Statistics(prompt_tokens=3, tokens=1)
    assert statistics.tokens_per_forward is None
    assert statistics.tokens_per_second is None
    statistics.count(2, 0, 1)
    assert statistics.conditional_acceptance == [0, None]


def test_totals_add_entry_by_entry() -> None:
    parts = [Statistics(tokens=1), Statistics(tokens=1)]
    parts[0].count(1, 1, 2)
    parts[1].count(3, 1, 2)
    parts[1].count(3, 3, 4)
    result = total(parts)
    assert (result.tokens, result.loop_tokens, result.forwards) == (10, 8, 3)
    assert result.drafted == [3, 2, 2]
    assert result.accepted == [3, 1, 1]
    assert result.histogram == [0, 0, 2, 0, 1]
    assert parts[0].drafted == [1]
