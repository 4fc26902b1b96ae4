"""How times are compared: contestants take turns, so that a change in the machine's load meets all of them alike."""

import random
import statistics
import time
from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """name -> seconds of each round. Every round runs each contestant once, in an order that turns round from round to round."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            times[name].append(seconds(contestants[name]))
    return times


def median_interval(values: list[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """Median, and the 95 % percentile-bootstrap interval of it (with a fixed seed)."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.median(values), medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def compare(rival: list[float], own: list[float]) -> str:
    """The ratio of paired times, rival over own: above 1, own is faster."""
    middle, low, high = median_interval([theirs / ours for theirs, ours in zip(rival, own, strict=True)])
    return f"{middle:.3f} (95 % interval {low:.3f} to {high:.3f}, {len(own)} pairs)"


def total_ratio(rival: list[float], own: list[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """All of the rival's paired times over all of our own, and the 95 % percentile-bootstrap interval over pairs (fixed seed)."""
    pairs, source = list(zip(rival, own, strict=True)), random.Random(0)
    found = []
    for _ in range(resamples):
        drawn = source.choices(pairs, k=len(pairs))
        found.append(sum(theirs for theirs, _ in drawn) / sum(ours for _, ours in drawn))
    found.sort()
    return sum(rival) / sum(own), found[int(0.025 * resamples)], found[int(0.975 * resamples)]
