"""How many tokens to draft: chosen anew each round from what rounds cost and how drafts fared.

A round of γ drafts gives E(γ) = 1 + Σ_j Π_{k<=j} a_k tokens on average, where a_k is the share of depth k's drafts accepted
among those whose earlier ones were. It costs T(γ) = t(γ+1) + γ c: a pass over γ+1 tokens and the drafts, measured as one, since
that is what is paid. The γ of greatest E/T is chosen; γ = 0 is plain decoding, E = 1, which wins where drafts cannot. Texts stay
lossless: a choice looks at earlier rounds only.

Of trees the depth is chosen; a_k is then the share of accepted paths that go on to depth k.

Nothing here measures time: whoever decodes does, so that a choice can be tested.
"""

from collections import deque

FORGET = 0.99
"""Weight of acceptance counts, a round later: about the last 100 rounds speak."""
DOUBT = 0.1
"""Added to a share of n drafts, over the root of n + 1: what is little known may be better than it seems."""
REMEMBERED = 4
"""Drafts of each depth that still count when another length is tried again, so that a few new ones can change the choice."""
MEASURES = 7
"""Rounds of each length whose cost is remembered; the lower quarter of them counts: whatever else runs on a machine only adds."""
TRIES = 3
"""Rounds of each length before the first choice."""
AGAIN = 100
"""Rounds after which another length is tried again: costs and texts change."""


class DraftLengths:
    """What is known of rounds of each length up to ``most``; it outlives a text."""

    def __init__(self, most: int) -> None:
        """Lengths compared: all up to 4, then each twice the last, and the most."""
        self.lengths = sorted({0, *(n for n in (1, 2, 3, 4) if n <= most), *_doubled(8, most), most})
        self.costs: dict[int, deque[float]] = {length: deque(maxlen=MEASURES) for length in self.lengths}
        self.stale: set[int] = set()
        self.reached, self.accepted = [0.0] * most, [0.0] * most
        self.rows, self.since = 0, 0
        self.turn = 0

    def choose(self, limit: int) -> int:
        """The length of the next round, ``limit`` at most."""
        able = [length for length in self.lengths if length <= limit]
        untried = [length for length in able if len(self.costs[length]) < TRIES]
        if untried:
            return untried[-1]
        best = max(able, key=self.rate)
        if self.since < AGAIN:
            return best
        # One that would lose even if every draft were accepted is not tried again.
        hopeful = [length for length in able if length != best and (1 + length) / self.cost(length) > self.rate(best)]
        if not hopeful:
            return best
        self.since, self.turn = 0, self.turn + 1
        for depth, reached in enumerate(self.reached):
            weight = min(1.0, REMEMBERED / reached) if reached else 1.0
            self.reached[depth], self.accepted[depth] = reached * weight, self.accepted[depth] * weight
        return hopeful[self.turn % len(hopeful)]

    def learn(self, length: int, accepted: list[int], seconds: float) -> None:
        """A round of that length is over: drafts accepted of each row, and what it cost. A length that is none of those compared
        (a text was nearly full) teaches acceptance only."""
        self.since += 1
        if len(accepted) != self.rows:
            # Other rounds are now cheaper or dearer by about as much as the next that is measured.
            self.rows, self.stale = len(accepted), {known for known, costs in self.costs.items() if costs}
        if length in self.costs:
            self._measure(length, seconds)
        for depth in range(len(self.reached)):
            tried = sum(count >= depth for count in accepted) if depth < length else 0
            if tried:
                self.reached[depth] = self.reached[depth] * FORGET + tried
                self.accepted[depth] = self.accepted[depth] * FORGET + sum(count > depth for count in accepted)

    def rate(self, length: int) -> float:
        """Expected tokens a second of a text. The length has been tried."""
        return self.expected(length) / self.cost(length)

    def expected(self, length: int) -> float:
        """E: tokens of a round, with the benefit of ``DOUBT``. A depth is like the one before unless known better."""
        total, share, like = 1.0, 1.0, 0.5
        for accepted, reached in zip(self.accepted[:length], self.reached, strict=False):
            like = min(1.0, (accepted + like) / (reached + 1) + DOUBT / (reached + 1) ** 0.5)
            share *= like
            total += share
        return total

    def cost(self, length: int) -> float:
        """T: seconds of a round. The length has been tried."""
        costs = sorted(self.costs[length])
        return costs[len(costs) // 4]

    def _measure(self, length: int, seconds: float) -> None:
        if length in self.stale:
            change = seconds / self.cost(length)
            for other in self.stale:
                self.costs[other] = deque((cost * change for cost in self.costs[other]), maxlen=MEASURES)
            self.stale = set()
        self.costs[length].append(seconds)


def _doubled(first: int, most: int) -> list[int]:
    found = []
    while first < most:
        found.append(first)
        first *= 2
    return found
