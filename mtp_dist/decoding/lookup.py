"""Drafts without a model: what followed the same tokens earlier in the text ("prompt lookup")."""

from typing import Self

from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.model import TrunkPass
from mtp_dist.decoding.text import Texts


class Followers:
    """One text: where the newest earlier occurrence of each run of 1 .. ``longest`` tokens ends."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self.next: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """The text goes on."""
        for token in tokens:
            place = len(self.tokens)
            for size in range(1, min(self.longest, place) + 1):
                self.next[tuple(self.tokens[place - size :])] = place
            self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """The ``count`` tokens that followed the longest run that the text ends in and that stands elsewhere, too; where they
        run into the end, the guess itself goes on. Empty: there is no such run."""
        for size in range(min(self.longest, len(self.tokens)), 0, -1):
            place = self.next.get(tuple(self.tokens[-size:]))
            if place is not None:
                grown = list(self.tokens)
                for source in range(place, place + count):
                    grown.append(grown[source])
                return grown[len(self.tokens) :]
        return []


class LookupDrafter:
    """``Followers`` of each text. A text without a repeated run has no drafts in that round."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.followers: list[Followers] = []

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.followers = [Followers(self.longest) for _ in range(len(texts))]

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        pass

    def propose(self, texts: Texts, count: int) -> Proposal:
        guesses = []
        for followers, row in zip(self.followers, texts.rows, strict=True):
            followers.extend(row[len(followers.tokens) :])
            guesses.append(followers.guess(count))
        counts = [len(guess) for guess in guesses]
        if not any(counts):
            return Proposal(texts.drafts(0), None)
        filled = texts.tokens.new_tensor([guess or [0] * count for guess in guesses])
        for place in range(count):
            texts.draft(place, filled[:, place])
        return Proposal(filled, None, None if all(counts) else counts)

    def keep(self, rows: list[int]) -> None:
        self.followers = [self.followers[row] for row in rows]

    def join(self, other: Self) -> None:
        self.followers = self.followers + other.followers
