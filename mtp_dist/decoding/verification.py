"""Which drafted tokens are accepted, and what follows them. Lossless but for one rule that says so: the text is distributed as if
by the trunk alone.

Pure functions of the trunk's distributions p, the drafter's q and the drafts; every drafter shares them.
Sources: speculative decoding, arXiv 2211.17192 (algorithm 1) and 2302.01318 (algorithm 2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.decoding.sampling import Source, draw, uniform


@dataclass(frozen=True)
class Verdict:
    """accepted int64 [B]: how many drafts, from the first on, are kept; token int64 [B]: the trunk's own token after them."""

    accepted: Tensor
    token: Tensor


def verify_greedy(drafts: Tensor, logits: Tensor, counts: Tensor | None = None) -> Verdict:
    """drafts int64 [B, γ], trunk logits [B, γ+1, V]: the longest prefix that equals the trunk's argmax, then the argmax.

    counts int64 [B]: drafts of each row, where some have fewer; what stands behind them is not read.
    """
    best = logits.argmax(-1)
    count = leading((best[:, :-1] == drafts) & made(drafts, counts))
    return Verdict(count, best.gather(1, count.unsqueeze(1)).squeeze(1))


def verify_sampled(drafts: Tensor, p: Tensor, q: Tensor | None, source: Source, counts: Tensor | None = None) -> Verdict:
    """drafts int64 [B, γ] drawn from q [B, γ, V] (None: chosen without chance); the trunk's p [B, γ+1, V]. counts: as above.

    Each draft is accepted with probability min(1, p/q). The first rejected one is replaced by a draw from max(0, p - q), scaled;
    if none is rejected, one more token is drawn from the last p.
    """
    if q is None:
        q = torch.zeros_like(p[:, :-1]).scatter_(-1, drafts.unsqueeze(-1), 1)
    here = made(drafts, counts)
    ratio = acceptance(drafts, p[:, :-1], q)
    accepted = (uniform(ratio, source, counts) < ratio) & here
    after = torch.cat((residual(p[:, :-1], q).where(here.unsqueeze(-1), p[:, :-1]), p[:, -1:]), dim=1)
    count = leading(accepted)
    return Verdict(count, draw(after[torch.arange(len(count), device=p.device), count], source))


def verify_typical(
    drafts: Tensor, p: Tensor, epsilon: float, delta: float, source: Source, counts: Tensor | None = None
) -> Verdict:
    """Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1). LOSSY: texts are no longer distributed as the trunk's.

    drafts int64 [B, γ], the trunk's p [B, γ+1, V], counts: as above. A draft is accepted if p of it is greater than min(epsilon,
    delta exp(-H)), H the entropy of p in nats. The token after the accepted ones is drawn from p.
    """
    count = leading(typical(drafts, p[:, :-1], epsilon, delta) & made(drafts, counts))
    return Verdict(count, draw(p[torch.arange(len(count), device=p.device), count], source))


def typical(drafts: Tensor, p: Tensor, epsilon: float, delta: float) -> Tensor:
    """bool [B, γ]: which drafts are likely enough by p [B, γ, V], each alone."""
    entropy = torch.special.entr(p).sum(-1)
    bound = (delta * (-entropy).exp()).clamp(max=epsilon)
    return p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) > bound


def made(drafts: Tensor, counts: Tensor | None) -> Tensor:
    """bool [B, γ]: which places hold a draft."""
    if counts is None:
        return torch.ones_like(drafts, dtype=torch.bool)
    return torch.arange(drafts.shape[1], device=drafts.device) < counts.unsqueeze(1)


def acceptance(drafts: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """[B, γ]: p/q of each draft, the chance to accept it (1 or more: always)."""
    index = drafts.unsqueeze(-1)
    return (p.gather(-1, index) / q.gather(-1, index)).squeeze(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """[B, γ, V]: what p has more than q; the weights of the token that replaces a rejected draft."""
    rest = (p - q).clamp(min=0)
    # Where rounding leaves nothing, p and q are the same distribution.
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def leading(right: Tensor) -> Tensor:
    """bool [B, γ] -> int64 [B]: how many are true before the first that is not."""
    return right.long().cumprod(1).sum(1)
