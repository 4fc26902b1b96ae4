"""What a generation cost and how its drafts fared. A ratio whose denominator is zero is None, never an invented number."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to load
    from mtp_dist.decoding.cache import Traffic


@dataclass
class Statistics:
    """Counts of one generation, or of several added together.

    The prefill runs the prompt through the trunk (and through the MTP modules, where they draft); its last position gives the
    first token. The loop after it gives the others: ``forwards`` are its passes through the trunk and ``seconds`` its wall time,
    drafting included. A text that ends inside accepted drafts counts the drafts up to its last token only.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    """Generated, the first and an end-of-document token included."""
    loop_tokens: int = 0
    """Those that the loop generated: one less for each text."""
    forwards: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)
    """Entry k-1: forwards that verified a draft of depth k."""
    reached: list[int] = field(default_factory=list)
    """Entry k-1: those that had accepted every draft before it."""
    accepted: list[int] = field(default_factory=list)
    """Entry k-1: those that accepted it, and so all before it."""
    histogram: list[int] = field(default_factory=list)
    """Entry n: forwards that gave n tokens."""
    nodes: int = 0
    """Drafts verified; of trees all nodes, so that there are more than one of a depth."""
    trunk_cache_written: int = 0
    """Bytes of keys and values that the loop wrote to the trunk's caches, rejected drafts included; of a text in a batch its row.
    These four are of this process, which has a part of the model where several decode together."""
    trunk_cache_read: int = 0
    """Bytes that it read from them: all positions, once a pass."""
    drafter_cache_written: int = 0
    """The same of what drafts: the MTP modules, or another model."""
    drafter_cache_read: int = 0

    def count(self, drafted: int, accepted: int, tokens: int, nodes: int | None = None) -> None:
        """One forward of the loop, with drafts up to depth ``drafted``, one of each; nodes: where they are more."""
        self.forwards += 1
        self.nodes += drafted if nodes is None else nodes
        self.tokens += tokens
        self.loop_tokens += tokens
        self.drafted = add(self.drafted, [1] * drafted)
        self.reached = add(self.reached, [int(k <= accepted) for k in range(drafted)])
        self.accepted = add(self.accepted, [1] * accepted + [0] * (drafted - accepted))
        self.histogram = add(self.histogram, [0] * tokens + [1])

    def move(self, trunk: "Traffic", drafter: "Traffic") -> None:
        """What a forward of the loop, and the drafts before it, moved through the caches."""
        self.trunk_cache_written += trunk.written
        self.trunk_cache_read += trunk.read
        self.drafter_cache_written += drafter.written
        self.drafter_cache_read += drafter.read

    @property
    def cache_bytes_per_token(self) -> dict[str, float | None]:
        """Bytes through the caches for each token of the loop."""
        moved = {
            "trunk_written": self.trunk_cache_written,
            "trunk_read": self.trunk_cache_read,
            "drafter_written": self.drafter_cache_written,
            "drafter_read": self.drafter_cache_read,
        }
        return {name: ratio(count, self.loop_tokens) for name, count in {**moved, "all": sum(moved.values())}.items()}

    @property
    def acceptance(self) -> list[float | None]:
        """Depth k's share of drafts accepted; a draft after a rejected one is not."""
        return [ratio(a, d) for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """The same among those whose earlier drafts were all accepted."""
        return [ratio(a, b) for a, b in zip(self.accepted, self.reached, strict=True)]

    @property
    def tokens_per_forward(self) -> float | None:
        return ratio(self.loop_tokens, self.forwards)

    @property
    def tokens_per_second(self) -> float | None:
        return ratio(self.loop_tokens, self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Counts and ratios, ready for JSON."""
        ratios = ("acceptance", "conditional_acceptance", "tokens_per_forward", "tokens_per_second", "cache_bytes_per_token")
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, *ratios)}


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sum of several generations."""
    result = Statistics()
    for part in parts:
        for name in Statistics.__dataclass_fields__:
            ours, theirs = getattr(result, name), getattr(part, name)
            setattr(result, name, add(ours, theirs) if isinstance(ours, list) else ours + theirs)
    return result


def add(a: list[int], b: list[int]) -> list[int]:
    """Entry by entry; the shorter list counts as filled with zeros."""
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None
