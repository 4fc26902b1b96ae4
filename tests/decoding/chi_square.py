"""Do counts come from a distribution? Pearson's test, with cells of few expected counts put together."""

import torch
from torch import Tensor


def excess(counts: Tensor, expected: Tensor) -> float:
    """Chi-square over the value that chance exceeds once in ten thousand times: above 1, it is another distribution."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    expected = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    if expected[-1] == 0:
        if counts[-1] > 0:  # something happened that cannot happen
            return float("inf")
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(counts) - 1
    # Wilson and Hilferty's approximation of the quantile (z = 3.719 for 1e-4).
    critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum()) / critical
