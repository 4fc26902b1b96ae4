"""Which path of a tree of drafts is accepted, and what follows it. Lossless but for one rule that says so.

Pure functions of a tree and the trunk's distributions p behind its root and every node, shared by all drafters.
Sources: SpecInfer, arXiv 2305.09781 (verification of trees); drawing siblings without replacement: arXiv 2402.14160.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.decoding import verification
from mtp_dist.decoding.sampling import Source, draw, uniform
from mtp_dist.decoding.tree import Tree


@dataclass(frozen=True)
class TreeVerdict:
    """node int64 [B]: the last node of the accepted path, -1 if none is; token int64 [B]: the trunk's own token after it."""

    node: Tensor
    token: Tensor


def verify_followed(tree: Tree, chosen: Tensor) -> TreeVerdict:
    """chosen int64 [B, 1+m]: the trunk's choice of a token behind the root and behind each node, its argmax or a draw from its p.

    The path is followed as long as a child is the token chosen at its parent. Greedy texts are the trunk's. So are sampled ones,
    for a tree that was chosen without chance: every token is drawn from p. (Accepting child x with probability p(x), or else
    going on to its next sibling with p less x, scaled, is the same.)
    """
    right = tree.tokens == chosen.gather(1, tree.parents + 1)
    node = _deepest(tree, _reached(tree, right))
    return TreeVerdict(node, chosen.gather(1, node.unsqueeze(1) + 1).squeeze(1))


def verify_drawn(tree: Tree, p: Tensor, source: Source) -> TreeVerdict:
    """A tree whose siblings were drawn without replacement from ``probabilities`` q; the trunk's p [B, 1+m, V].

    At each node, its children in turn: x is accepted with probability min(1, p(x)/q(x)). If it is not, p becomes max(0, p - q),
    and q loses x, both scaled to 1, and the next one is tried. The token after the path is drawn from what p then is.
    """
    assert tree.probabilities is not None
    rows, table = torch.arange(len(p), device=p.device), _children(tree)
    at = torch.zeros_like(rows)  # 0: the root; node i is i + 1
    going = torch.ones_like(rows, dtype=torch.bool)
    final = p[:, 0]
    # One for each node, also where it is not tried: what a text draws must not depend on the other rows' trees.
    luck = uniform(p[:, 1:, 0], source)
    for _ in range(int(tree.depths.max()) + 1):
        rest, q = p[rows, at], tree.probabilities[rows, at]
        accepted, following = torch.zeros_like(going), at
        for child in table[rows, at].unbind(1):
            token = tree.tokens.gather(1, child.clamp(min=0).unsqueeze(1))
            tried = going & ~accepted & (child >= 0) & (q.gather(1, token).squeeze(1) > 0)
            ratio = verification.acceptance(token, rest.unsqueeze(1), q.unsqueeze(1))
            kept = tried & (luck.gather(1, child.clamp(min=0).unsqueeze(1)) < ratio).squeeze(1)
            accepted, following = accepted | kept, torch.where(kept, child + 1, following)
            left = (tried & ~kept).unsqueeze(1)
            rest = torch.where(left, _scaled(verification.residual(rest, q)), rest)
            q = torch.where(left, _scaled(q.scatter(1, token, 0)), q)
        final = torch.where((going & ~accepted).unsqueeze(1), rest, final)
        going, at = going & accepted, following
    return TreeVerdict(at - 1, draw(final, source))


def verify_typical_tree(tree: Tree, p: Tensor, epsilon: float, delta: float, source: Source) -> TreeVerdict:
    """Typical acceptance (``verification.verify_typical``) along every path; the longest is taken, of several the first. LOSSY.
    The trunk's p [B, 1+m, V]; the token after the path is drawn from p."""
    before = p.gather(1, (tree.parents + 1).unsqueeze(2).expand(-1, -1, p.shape[2]))
    likely = verification.typical(tree.tokens, before, epsilon, delta)
    node = _deepest(tree, _reached(tree, likely))
    return TreeVerdict(node, draw(p[torch.arange(len(p), device=p.device), node + 1], source))


def _reached(tree: Tree, right: Tensor) -> Tensor:
    """bool [B, m] -> bool [B, m]: which are right, and all their ancestors."""
    return (right.unsqueeze(1) | ~tree.lineage).all(2)


def _deepest(tree: Tree, reached: Tensor) -> Tensor:
    """int64 [B]: the deepest node reached, of several the first; -1 if none is."""
    places = torch.arange(tree.nodes, device=reached.device)
    node = (tree.depths * reached * (tree.nodes + 1) - places).argmax(1)
    return torch.where(reached.any(1), node, -1)


def _children(tree: Tree) -> Tensor:
    """int64 [B, 1+m, s]: the children of the root and of each node in order, filled up with -1; s: the most of any."""
    siblings = tree.parents.unsqueeze(2) == tree.parents.unsqueeze(1)
    rank = siblings.tril(-1).sum(2)  # [B, m]
    table = tree.parents.new_full((len(rank), tree.nodes + 1, int(rank.max()) + 1), -1)
    rows = torch.arange(len(rank), device=rank.device).unsqueeze(1)
    table[rows, tree.parents + 1, rank] = torch.arange(tree.nodes, device=rank.device).expand_as(rank)
    return table


def _scaled(weights: Tensor) -> Tensor:
    """[B, V] to sum 1; zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1)
