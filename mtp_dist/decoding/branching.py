"""What drafts behind every node of a growing tree, level by level: each drafter of a chain, asked for many children at once.

``after`` runs what the newest nodes need and returns what may follow each of them. Entries that belong to nodes stand in the
drafter's caches behind those of the known text, and ``done`` forgets them: the next round makes those of the accepted path anew,
in the pass that it needs anyway, so that the caches hold nothing that a chain's would not.
"""

from typing import Protocol, Self

import torch
from torch import Tensor

from mtp_dist.decoding.chain import ChainDrafter
from mtp_dist.decoding.drafter import spread
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.side_by_side import ParallelDrafter, PointDrafter
from mtp_dist.decoding.small_model import ModelDrafter
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Branches, Tree
from mtp_dist.model.mtp.medusa import MedusaModule


class Branching(Protocol):
    """Grows trees behind one batch of texts. ``prefill``, ``observe``, ``keep`` and ``join`` are a ``Drafter``'s."""

    model: DecodingModel

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None: ...

    def observe(self, texts: Texts, trunk: TrunkPass) -> None: ...

    def keep(self, rows: list[int]) -> None: ...

    def join(self, other: Self) -> None: ...

    def able(self, texts: Texts) -> bool:
        """Whether the texts are long enough."""
        ...

    def after(self, texts: Texts, grown: Tree, newest: int, level: int) -> Tensor:
        """Logits [B, newest, V] of what follows the last ``newest`` nodes, all of depth ``level`` - 1; level 1: [B, 1, V] of what
        follows the known text. [B, 1, V] also where it is the same for all. The nodes' tokens are written behind the known ones.
        """
        ...

    def done(self, texts: Texts) -> None:
        """The tree is complete."""
        ...


class ChainBranching(ChainDrafter):
    """A chain of modules. Module k's entry of a node of depth e < k stands at position n-k+e: its input h^{k-1} is module k-1's
    state at the node's parent, its token the node's. Beyond the last module that one's own state at the parent stands in."""

    states: Tensor  # [B, 1 + nodes, d], the newest module's, handed on: at the newest known token, and at each node

    def able(self, texts: Texts) -> bool:
        return min(texts.known) >= len(self.steps)

    def after(self, texts: Texts, grown: Tree, newest: int, level: int) -> Tensor:
        if level <= len(self.steps):
            ready = self._all(texts, grown, level)[:, -max(newest, 1) :]
        else:
            ready = self._newest(texts, grown, newest)
        logits, tokens = self.model.draft_logits(ready, self.model.matrix_of(level)), self.model.drafted
        return logits if tokens is None else spread(logits, tokens, self.model.vocabulary, float("-inf"))

    def done(self, texts: Texts) -> None:
        for depth, cache in enumerate(self.caches, start=1):
            cache.crop([known - depth for known in texts.known])
        del self.states

    def _all(self, texts: Texts, grown: Tree, depth: int) -> Tensor:
        """Module ``depth`` at the known tokens that it has not seen, and at all nodes; its states [B, 1 + nodes, d] for the
        head."""
        cache, first = self.caches[depth - 1], [known - depth for known in texts.known]
        span = self.model.span(cache.lengths, first)
        hidden, whole, branches = self.inputs[depth - 1].read(span), span, None
        if grown.nodes:
            # Nodes follow each row's own known positions; what fills a shorter row up comes last.
            nodes = range(span.width, span.width + grown.nodes)
            order = torch.tensor([[*range(n), *nodes, *range(n, span.width)] for n in span.counts], device=hidden.device)
            hidden = _taken(torch.cat((hidden, _taken(self.states, grown.parents + 1)), dim=1), order)
            whole = self.model.span(cache.lengths, [end + grown.nodes for end in first])
            branches = Branches(grown, texts.known, depth)
        ready, handed = self.model.module(self.steps[depth - 1], depth, hidden, texts.tokens, cache, whole, branches)
        if depth < len(self.inputs):
            self.inputs[depth].write(span, handed)
        places = torch.tensor([[max(count - 1 + node, 0) for node in range(1 + grown.nodes)] for count in span.counts])
        places = places.to(hidden.device)
        self.states = _taken(handed, places)
        return _taken(ready, places)

    def _newest(self, texts: Texts, grown: Tree, newest: int) -> Tensor:
        """The last module at the newest nodes; its states [B, newest, d] for the head."""
        cache, depth = self.caches[-1], len(self.steps)
        span = self.model.span(cache.lengths, [length + newest for length in cache.lengths])
        hidden, branches = _taken(self.states, grown.parents[:, -newest:] + 1), Branches(grown, texts.known, depth)
        ready, handed = self.model.module(self.steps[-1], depth, hidden, texts.tokens, cache, span, branches)
        self.states = torch.cat((self.states, handed), dim=1)
        return ready


class ParallelBranching(ParallelDrafter):
    """Depth k's distribution is the same behind every node of depth k-1."""

    def able(self, texts: Texts) -> bool:
        return True

    def after(self, texts: Texts, grown: Tree, newest: int, level: int) -> Tensor:
        return self.model.logits(self._run(level, texts.tokens, self.positions)).unsqueeze(1)

    def done(self, texts: Texts) -> None:
        pass


class PointBranching(PointDrafter):
    """Medusa's heads, the same behind every node of a depth; the notebook's, each node with a state of its own."""

    states: Tensor  # [B, 1 + nodes, d], of the notebook's

    def able(self, texts: Texts) -> bool:
        return True

    def after(self, texts: Texts, grown: Tree, newest: int, level: int) -> Tensor:
        assert self.state is not None
        module, matrix = self.heads.of_depth(level), self.model.matrix_of(level)
        if isinstance(module, MedusaModule):
            return self.model.logits(module(self.state), matrix).unsqueeze(1)
        if level == 1:
            tokens = self.model.span([known - 1 for known in texts.known], texts.known).read(texts.tokens)
            self.states = ready = module(self.state.unsqueeze(1), self.model.embedding_of(level)(tokens))
        else:
            hidden = _taken(self.states, grown.parents[:, -newest:] + 1)
            ready = module(hidden, self.model.embedding_of(level)(grown.tokens[:, -newest:]))
            self.states = torch.cat((self.states, ready), dim=1)
        return self.model.logits(ready, matrix)

    def done(self, texts: Texts) -> None:
        pass


class ModelBranching(ModelDrafter):
    """Another model's trunk, which runs trees as the verifying one does."""

    def able(self, texts: Texts) -> bool:
        return True

    def after(self, texts: Texts, grown: Tree, newest: int, level: int) -> Tensor:
        if level == 1:
            span = self.model.span(self.caches[0].lengths, texts.known)
            return self.model.logits(span.last(self.model.trunk(texts.tokens, self.caches, texts.known).after_norm)).unsqueeze(1)
        ends = [known + grown.nodes for known in texts.known]
        branches = Branches(grown, texts.known)
        return self.model.logits(self.model.trunk(texts.tokens, self.caches, ends, branches).after_norm)

    def done(self, texts: Texts) -> None:
        for cache in self.caches:
            cache.crop(texts.known)


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """states [B, n, d], places int64 [B, w] -> [B, w, d]."""
    return states.gather(1, places.unsqueeze(2).expand(-1, -1, states.shape[2]))
