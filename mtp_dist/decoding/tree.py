"""A tree of drafts behind each text of a batch, and where its nodes stand in a cache.

Nodes are numbered so that parents come before their children. A node goes on the text that the nodes from the root to it spell,
and its position is that of its depth: siblings share one. In a cache each node has a slot of its own, behind what is known.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtp_dist.decoding.cache import Span


@dataclass(frozen=True)
class Tree:
    """m nodes a row. tokens int64 [B, m]; parents int64 [B, m]: the parent's number, -1 for a node right behind the known text;
    depths int64 [B, m], counted from 1. probabilities [B, 1+m, V]: of each node's children, if they were drawn, without
    replacement, in the order of their numbers (the root comes first); None if they were chosen without chance."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    probabilities: Tensor | None = None

    @property
    def nodes(self) -> int:
        """m."""
        return self.tokens.shape[1]

    @cached_property
    def lineage(self) -> Tensor:
        """bool [B, m, m]: node (row) has that ancestor (column), or is it."""
        places = torch.arange(self.nodes, device=self.parents.device)
        own = (places.unsqueeze(1) == places).expand(len(self.parents), -1, -1)
        inner, index = (self.parents >= 0).unsqueeze(2), self.parents.clamp(min=0).unsqueeze(2).expand_as(own)
        found = own
        for _ in range(int(self.depths.max()) - 1):
            found = own | found.gather(1, index) & inner
        return found

    def paths(self, last: Tensor) -> list[list[int]]:
        """last int64 [B] -> for each row the nodes from the root to that one; none for -1."""
        found = []
        for parents, node in zip(self.parents.tolist(), last.tolist(), strict=True):
            path = []
            while node >= 0:
                path.append(node)
                node = parents[node]
            found.append(path[::-1])
        return found


def filled(paths: list[list[int]]) -> list[list[int]]:
    """Paths of equal length: behind its end each has slots that stay what they are."""
    width = max(map(len, paths))
    return [[*path, *range(len(path), width)] for path in paths]


class Branches:
    """What a pass over a tree's nodes needs to know: their positions, and who sees whom.

    The layer's entries belong to the tokens ``ahead`` of their positions (the trunk: 0; module k: k). Row b has known[b] tokens,
    so entries of known tokens fill the slots below known[b] - ahead, and node i stands in slot i behind them.
    """

    def __init__(self, tree: Tree, known: list[int], ahead: int = 0) -> None:
        self.tree, self.ahead = tree, ahead
        self.known = torch.tensor(known, device=tree.tokens.device).unsqueeze(1)
        self.first = self.known - ahead  # [B, 1]

    def positions(self, span: Span) -> Tensor:
        """int64 [B, width]: rotary positions of a span of slots."""
        node = span.positions - self.first
        depths = self.tree.depths.gather(1, node.clamp(min=0))
        return torch.where(node < 0, span.positions, self.first - 1 + depths)

    def visible(self, tokens: Tensor, span: Span, end: int | None) -> Tensor:
        """bool [B, 1, width, total]: which slots each slot of the span sees: known ones before it; a node also its ancestors and
        itself. tokens [B, >= total]; ``end`` parts documents, None: it does not."""
        columns = torch.arange(span.total, device=tokens.device)
        node, other = span.positions - self.first, columns - self.first
        lineage = _picked(self.tree.lineage, node, other)
        is_node = (node >= 0).unsqueeze(2) & (other >= 0).unsqueeze(1)
        seen = torch.where(is_node, lineage, columns <= span.positions.unsqueeze(2))
        seen = seen & (other < self.tree.nodes).unsqueeze(1)  # a longer row goes on
        if end is not None and (tokens[:, : span.total + self.ahead] == end).any():
            documents = self._documents(tokens, other, end)
            seen = seen & (documents.gather(1, span.positions).unsqueeze(2) == documents.unsqueeze(1))
        return seen.unsqueeze(1)

    def _documents(self, tokens: Tensor, other: Tensor, end: int) -> Tensor:
        """int64 [B, total]: the document of each slot's position: how many documents ended before it, on the way to its node."""
        ends = (tokens[:, : int(self.known.max())] == end).long()
        before = torch.cat((torch.zeros_like(ends[:, :1]), ends.cumsum(1)), dim=1)  # [B, known + 1]
        depths = self.tree.depths
        # A node of depth e is the token at position known - 1 + e; its entry here, e - ahead behind the newest known one.
        passed = self.tree.lineage & (depths.unsqueeze(1) < (depths - self.ahead).unsqueeze(2))
        drafted = (passed & (self.tree.tokens == end).unsqueeze(1)).sum(2)
        nodes = before.gather(1, torch.minimum(self.first - 1 + depths, self.known)) + drafted
        columns = (other + self.first).expand_as(other).clamp(max=before.shape[1] - 1)
        return torch.where(other < 0, before.gather(1, columns), nodes.gather(1, other.clamp(0, self.tree.nodes - 1)))


def _picked(lineage: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """lineage [B, m, m], rows int64 [B, n], columns int64 [B, t] -> [B, n, t]; what is no node reads anything."""
    nodes = lineage.shape[1]
    rows, columns = rows.clamp(0, nodes - 1), columns.clamp(0, nodes - 1)
    found = lineage.gather(1, rows.unsqueeze(2).expand(-1, -1, nodes))
    return found.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))
