"""Means over seeds with 95 % intervals (Student's t): seeds are few, so intervals are wide, and say so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % points of Student's t with 1, 2, .. degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
NORMAL975 = 1.960


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; None where a single value allows none."""

    mean: float
    half: float | None

    @property
    def resolved(self) -> bool:
        """Whether zero lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int, *, sign: bool = False) -> str:
        shown = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return shown if self.half is None else f"{shown} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = T975[count - 2] if count - 2 < len(T975) else NORMAL975 + 2.5 / (count - 1)
    return Interval(mean, quantile * deviation / math.sqrt(count))


def difference(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Of values paired by seed."""
    return interval([value - other for value, other in zip(values, base, strict=True)])
