"""Trees of drafts: static ones of a given shape (Medusa, arXiv 2401.10774), and dynamic ones (EAGLE-2, arXiv 2406.16858).

Dynamic: at each depth the ``width`` nodes of the greatest probability, as the drafter multiplies it up along the path, get
``width`` children each; of all these candidates the best ``nodes`` are verified. Static: the places are given.
The tokens are the drafter's likeliest, or, where texts are sampled, drawn without replacement.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from mtp_dist.decoding.branching import Branching
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.model import TrunkPass
from mtp_dist.decoding.sampling import Sampling, Source, uniform
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Tree
from mtp_dist.decoding.tree_shape import ordered

Grow = Callable[["Growth", int], Tree]


class Growth:
    """The nodes that got children so far, in the order in which they got them, and what drafts behind them."""

    def __init__(self, branching: Branching, texts: Texts) -> None:
        self.branching, self.texts = branching, texts
        nothing = texts.drafts(0)
        self.tree = Tree(nothing, nothing, nothing)
        self.level = self.newest = 0

    def logits(self) -> Tensor:
        """[B, newest, V]: what follows the newest nodes (at first: the known text); [B, 1, V] where all are alike."""
        self.level += 1
        return self.branching.after(self.texts, self.tree, self.newest, self.level)

    def extend(self, tokens: Tensor, places: Tensor) -> None:
        """Nodes int64 [B, w] that get children next. places int64 [B, w]: which of the newest nodes are their parents; not read
        where those are the first."""
        grown, same = self.tree, self.branching.model.same
        tokens, places = same(tokens), same(places)
        parents = places + (grown.nodes - self.newest) if grown.nodes else torch.full_like(tokens, -1)
        new = (tokens, parents, torch.full_like(tokens, self.level))
        old = (grown.tokens, grown.parents, grown.depths)
        self.tree, self.newest = Tree(*(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))), tokens.shape[1]
        self.texts.branch(self.tree.tokens)


class TreeDrafter:
    """A ``Drafter`` of trees. ``grow(growth, depth)`` makes one of at most that depth."""

    def __init__(self, branching: Branching, grow: Grow) -> None:
        self.branching, self.grow = branching, grow

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.branching.prefill(texts, trunk)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        self.branching.observe(texts, trunk)

    def propose(self, texts: Texts, count: int) -> Proposal | Tree:
        """A tree of depth ``count`` >= 1 at most, its tokens also written behind the known ones. No drafts where texts are too
        short for one."""
        if not self.branching.able(texts):
            return Proposal(texts.drafts(0), None)
        tree = self.grow(Growth(self.branching, texts), count)
        self.branching.done(texts)
        texts.branch(tree.tokens)
        return tree

    def keep(self, rows: list[int]) -> None:
        self.branching.keep(rows)

    def join(self, other: Self) -> None:
        self.branching.join(other.branching)


class Pool:
    """All candidates of a dynamic tree, depth by depth: [B, P] each."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []
        self.size = 0

    def add(self, *new: Tensor) -> None:
        """tokens, parents (numbers of candidates, -1: none), depths, scores."""
        self.parts.append(new)
        self.size += new[0].shape[1]

    def best(self, nodes: int, inner: list[Tensor], q: list[Tensor]) -> Tree:
        """The tree of the candidates of the greatest scores. inner: numbers [B, w] of those that got children, of depth 1, 2, ..;
        q: what children were drawn from, [B, w or 1, V] behind the known text and behind them; empty: not drawn."""
        tokens, parents, depths, scores = (torch.cat(part, dim=1) for part in zip(*self.parts, strict=True))
        # Stable: a child never has more than its parent or an earlier sibling, and follows where it has as much.
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, :nodes].sort(dim=1).values
        numbers = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        parents = parents.gather(1, kept)
        parents = torch.where(parents < 0, parents, numbers.gather(1, parents.clamp(min=0)))
        found = None
        if q:
            # Places: 0 for a node without children, 1 for the known text, then the inner nodes.
            of_inner = [part.expand(-1, these.shape[1], -1) for part, these in zip(q[1:], inner, strict=True)]
            behind = torch.cat((torch.zeros_like(q[0]), q[0], *of_inner), dim=1)
            places = torch.zeros_like(tokens)
            if inner:
                every = torch.cat(inner, dim=1)
                places.scatter_(1, every, torch.arange(2, 2 + every.shape[1], device=every.device).expand_as(every))
            chosen = torch.cat((torch.ones_like(kept[:, :1]), places.gather(1, kept)), dim=1)
            found = behind.gather(1, chosen.unsqueeze(2).expand(-1, -1, behind.shape[2]))
        return Tree(tokens.gather(1, kept), parents, depths.gather(1, kept), found)


def dynamic(nodes: int, width: int, sampling: Sampling, source: Source) -> Grow:
    """EAGLE-2's: of all candidates the ``nodes`` best. Where texts are sampled, a node's j-th child is drawn, and has the score
    of the j-th likeliest token: whether a child is verified must not depend on which token it is."""
    drawn = draws(sampling)

    def grow(growth: Growth, depth: int) -> Tree:
        pool = Pool()
        inner: list[Tensor] = []
        q: list[Tensor] = []
        above = torch.empty(0)  # scores [B, w] of the nodes that got children last
        for level in range(1, depth + 1):
            logits = growth.logits()
            count = min(width, logits.shape[-1])
            if drawn:
                q.append(sampling.probabilities(logits))
                values, tokens = q[-1].topk(count, dim=-1).values.log(), race(q[-1], count, source)
            else:
                values, tokens = logits.log_softmax(-1).topk(count, dim=-1)
            if level > 1:
                # Where all nodes are alike, so are their children.
                values, parents = above.unsqueeze(2) + values, inner[-1].unsqueeze(2)
            else:
                parents = torch.full_like(tokens, -1)
            scores, tokens, parents = (part.expand(values.shape).flatten(1) for part in (values, tokens, parents))
            begin = pool.size
            pool.add(tokens, parents, torch.full_like(tokens, level), scores)
            if level < depth:
                above, places = scores.topk(min(width, scores.shape[1]), dim=1)
                inner.append(begin + places)
                growth.extend(tokens.gather(1, places), places // values.shape[-1])
        return pool.best(nodes, inner, q)

    return grow


def draws(sampling: Sampling) -> bool:
    """Whether nodes are drawn, and not the likeliest."""
    return not sampling.greedy and sampling.typical is None


def static(shape: Sequence[Sequence[int]], sampling: Sampling, source: Source) -> Grow:
    """Of that shape (see ``tree_shape``), as far as the depth allows."""
    whole, drawn = ordered(shape), draws(sampling)

    def grow(growth: Growth, depth: int) -> Tree:
        paths = [path for path in whole if len(path) <= depth]
        numbers = {path: number for number, path in enumerate(paths)}
        inner = {path[:-1] for path in paths}
        parents: list[tuple[int, ...]] = [()]  # the nodes of the depth before that get children
        tokens, q = [], []
        for level in range(1, max(map(len, paths)) + 1):
            here = [path for path in paths if len(path) == level]
            choices, distribution = _choices(growth.logits(), max(path[-1] for path in here) + 1, sampling, source, drawn=drawn)
            places = [parents.index(path[:-1]) for path in here]
            # Where all nodes are alike, so are the choices behind them.
            found = choices[:, [place % choices.shape[1] for place in places], [path[-1] for path in here]]
            tokens.append(found)
            q.append((parents, distribution))
            going = [column for column, path in enumerate(here) if path in inner]
            if going:
                above = found.new_tensor([places[column] for column in going])
                growth.extend(found[:, going], above.expand(len(found), -1))
                parents = [here[column] for column in going]
        batch = len(tokens[0])
        row = growth.tree.tokens.new_tensor([[numbers.get(path[:-1], -1) for path in paths], [len(path) for path in paths]])
        return Tree(
            torch.cat(tokens, dim=1), row[0].expand(batch, -1), row[1].expand(batch, -1), _spread(q, numbers) if drawn else None
        )

    return grow


def _choices(logits: Tensor, count: int, sampling: Sampling, source: Source, *, drawn: bool) -> tuple[Tensor, Tensor]:
    """logits [B, w, V] -> (tokens [B, w, count], the likeliest or drawn one after the other without replacement; what they were
    drawn from [B, w, V])."""
    if not drawn:
        return logits.topk(count, dim=-1).indices, logits
    q = sampling.probabilities(logits)
    return race(q, count, source), q


def race(q: Tensor, count: int, source: Source) -> Tensor:
    """q [B, .., V] -> int64 [B, .., count]: tokens drawn one after the other without replacement; where fewer than ``count`` are
    possible, impossible ones follow."""
    # Exponential clocks at the rates q: the order of arrival is that of such draws.
    clocks = -torch.log1p(-uniform(q, source))
    return (q / clocks.clamp(min=torch.finfo(q.dtype).tiny)).topk(count, dim=-1).indices


def _spread(q: list[tuple[list[tuple[int, ...]], Tensor]], numbers: dict[tuple[int, ...], int]) -> Tensor:
    """Distributions of nodes' children by depth -> [B, 1+m, V] by number, behind the root's; nodes without children have none."""
    first = q[0][1]
    spread = first.new_zeros(len(first), 1 + len(numbers), first.shape[-1])
    for parents, distribution in q:
        spread[:, [1 + numbers.get(path, -1) for path in parents]] = distribution
    return spread
