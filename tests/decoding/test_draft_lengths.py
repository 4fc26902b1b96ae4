"""The draft length goes where most tokens a second are, whatever drafts cost and however often they are accepted."""

import random

import pytest

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.draft_lengths import DraftLengths
from mtp_dist.decoding.engine import generate_batch
from tests.decoding.test_engine import PROMPTS, half_taught


class World:
    """Rounds that cost fixed + pass_ (γ+1) + draft γ, each draft accepted by chance; now and then a round takes ten times as
    long. period: every so many rounds the machine becomes twice as slow, or as fast as it was."""

    def __init__(
        self, share: float, *, fixed: float, pass_: float, draft: float, rows: int = 1, period: int | None = None
    ) -> None:
        self.share, self.fixed, self.pass_, self.draft, self.rows, self.period = share, fixed, pass_, draft, rows, period
        self.random, self.rounds = random.Random(0), 0

    def cost(self, length: int) -> float:
        return self.fixed + self.pass_ * (length + 1) + self.draft * length

    def speed(self, *lengths: int) -> float:
        """Tokens a second of rounds of these lengths, on average over chance."""
        tokens = sum(sum(self.share**k for k in range(length + 1)) for length in lengths)
        return tokens / sum(map(self.cost, lengths))

    def run(self, lengths: DraftLengths, rounds: int, limit: int = 99) -> list[int]:
        chosen = []
        for _ in range(rounds):
            length = lengths.choose(limit)
            accepted = []
            for _ in range(self.rows):
                count = 0
                while count < length and self.random.random() < self.share:
                    count += 1
                accepted.append(count)
            hiccup = 10 if self.random.random() < 0.05 else 1
            self.rounds += 1
            slow = 2 if self.period and self.rounds // self.period % 2 else 1
            lengths.learn(length, accepted, self.cost(length) * slow * hiccup * self.random.uniform(0.95, 1.05))
            chosen.append(length)
        return chosen


WORLDS = {
    "a pass costs the same for any tokens": World(0.8, fixed=10, pass_=0.1, draft=0.5),
    "many are accepted": World(0.95, fixed=10, pass_=0.5, draft=0.1),
    "few are accepted": World(0.3, fixed=10, pass_=1, draft=1),
    "drafts as dear as tokens": World(0.9, fixed=0, pass_=10, draft=5),
    "none is accepted": World(0.0, fixed=10, pass_=0.1, draft=0.1),
    "a batch": World(0.7, fixed=10, pass_=1, draft=0.5, rows=8),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("most", [1, 3, 6, 12])
def test_the_choice_is_close_to_the_best(name: str, most: int) -> None:
    world, lengths = WORLDS[name], DraftLengths(most)
    world.run(lengths, 50)
    chosen = world.run(lengths, 300)
    best = max(world.speed(length) for length in lengths.lengths)
    assert world.speed(*chosen) > 0.9 * best
    assert world.speed(*chosen) > 0.97 * world.speed(0)


def test_drafts_that_cannot_win_are_left_alone() -> None:
    """Speed over a long text stays within a hundredth of plain decoding's, but for the first rounds."""
    world, lengths = WORLDS["drafts as dear as tokens"], DraftLengths(4)
    first = world.run(lengths, 20)
    assert set(first) == {0, 1, 2, 3, 4}
    assert set(world.run(lengths, 1000)) == {0}


def test_what_may_win_is_tried_again_and_taken_up() -> None:
    lengths = DraftLengths(3)
    world = World(0.0, fixed=10, pass_=1, draft=1)
    chosen = world.run(lengths, 1100)[100:]
    assert max(chosen) > 0
    assert world.speed(*chosen) > 0.98 * world.speed(0)
    chosen = World(0.95, fixed=10, pass_=1, draft=1).run(lengths, 500)
    assert chosen[-50:].count(3) > 45


@pytest.mark.parametrize("period", [15, 40])
def test_a_machine_that_changes_its_speed_costs_little(period: int) -> None:
    """Each time that it slows down, lengths measured before look twice as fast, until they are tried."""
    lengths = DraftLengths(3)
    world = World(0.8, fixed=10, pass_=0.3, draft=1, period=period)
    chosen = world.run(lengths, 800)
    assert world.speed(*chosen) > 0.95 * world.speed(3)


def test_a_batch_that_shrinks_keeps_what_it_knows() -> None:
    lengths = DraftLengths(4)
    World(0.9, fixed=10, pass_=4, draft=1, rows=8).run(lengths, 100)
    chosen = World(0.9, fixed=1, pass_=0.4, draft=0.1, rows=7).run(lengths, 90)
    assert max(lengths.stale, default=0) == 0
    assert chosen[-60:].count(4) > 50


def test_a_limit_is_kept() -> None:
    lengths = DraftLengths(6)
    for limit in (0, 1, 5, 2):
        assert max(WORLDS["many are accepted"].run(lengths, 40, limit)) <= limit


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_greedy_or_of_their_length_whatever_is_chosen(temperature: float) -> None:
    lengths = DraftLengths(3)
    config = DecodeConfig(mode="speculative", auto=True, draft=3, max_new_tokens=24, temperature=temperature)
    for _ in range(2):
        results = generate_batch(half_taught(), PROMPTS, config, lengths=lengths)
        if temperature == 0:
            plain = generate_batch(half_taught(), PROMPTS, DecodeConfig(mode="plain", max_new_tokens=24))
            assert [result.tokens for result in results] == [result.tokens for result in plain]
        assert [len(result.tokens) for result in results] == [24] * len(PROMPTS)
    assert all(len(costs) >= 3 for costs in lengths.costs.values())
