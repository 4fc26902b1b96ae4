"""pass@k: the chance that at least one of k programs is right, estimated from n >= k of which c are right, without bias.

1 - C(n-c, k) / C(n, k) (Chen and others, arXiv 2107.03374, equation 1), as a product that does not overflow.
"""

import math
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """n programs, c of them right, 1 <= k <= n."""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"k={k} and c={c} must fit n={n}")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def mean_pass_at_k(right: Sequence[int], n: int, k: int) -> float:
    """Over problems; `right`: how many of each one's n programs are."""
    return sum(pass_at_k(n, c, k) for c in right) / len(right)
