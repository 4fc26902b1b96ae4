"""The rounds of texts that one model continues side by side: draft, verify in one pass through the trunk, keep what is accepted
and the trunk's own token after it.

Texts of a batch go on each as far as its own drafts are accepted; they may leave between two rounds, and others may join.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_dist.decoding.drafter import Drafter, Proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling, Source, draw
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Branches, Tree, filled
from mtp_dist.decoding.tree_verification import TreeVerdict, verify_drawn, verify_followed, verify_typical_tree
from mtp_dist.decoding.verification import Verdict, verify_greedy, verify_sampled, verify_typical


@dataclass(frozen=True)
class Round:
    """What one forward gave a text: ``tokens`` are the accepted drafts and one more; drafts of depths up to ``drafted`` were
    verified, ``nodes`` in all: where they form no tree, as many."""

    tokens: list[int]
    drafted: int
    nodes: int


class Batch:
    """Texts that one model continues side by side. The caller says how many drafts a round may have, and which texts go on."""

    def __init__(
        self,
        model: DecodingModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        drafter: Drafter | None,
        chance: Chance,
    ) -> None:
        self.model, self.sampling, self.drafter, self.chance = model, sampling, drafter, chance
        self.texts = Texts(prompts, model.capacity, model.device)
        self.caches = model.caches(len(prompts))

    def start(self) -> list[Round]:
        """The pass over the prompts: each text's first token. Called once, first."""
        trunk = self.model.trunk(self.texts.tokens, self.caches, self.texts.known)
        if self.drafter is not None:
            self.drafter.prefill(self.texts, trunk)
        span = self.model.span([0] * len(self.texts), self.texts.known)
        nothing = Proposal(self.texts.drafts(0), None)
        none = [0] * len(self.texts)
        found = self.model.decide(span.last(trunk.after_norm), lambda logits: self._judge(nothing, logits.unsqueeze(1)))
        return self._extend(found, none, none)

    def advance(self, drafts: int) -> list[Round]:
        """A round: at most ``drafts`` drafts of each text, verified in one pass through the trunk."""
        texts = self.texts
        proposal: Proposal | Tree = Proposal(texts.drafts(0), None)
        if self.drafter is not None and drafts:
            proposal = self.drafter.propose(texts, drafts)
        if isinstance(proposal, Tree):
            return self._branch(proposal)
        width = proposal.tokens.shape[1]
        trunk = self.model.trunk(texts.tokens, self.caches, [known + width for known in texts.known])
        found = self.model.decide(trunk.after_norm, lambda logits: self._judge(proposal, logits))
        counts = proposal.counts or [width] * len(texts)
        return self._close(found, trunk, counts, counts)

    def _branch(self, tree: Tree) -> list[Round]:
        """The round of a tree of drafts: of the entries and states of its nodes, those of each row's accepted path stay."""
        texts, known = self.texts, self.texts.known
        trunk = self.model.trunk(texts.tokens, self.caches, [n + tree.nodes for n in known], Branches(tree, known))
        paths, tokens = self.model.decide(trunk.after_norm, lambda logits: self._follow(tree, logits))
        slots = filled(paths)
        if any(row != list(range(len(row))) for row in slots):
            places = torch.tensor(slots, device=texts.tokens.device)
            for cache in self.caches:
                cache.pick(known, places)
            trunk = trunk.picked(torch.cat((torch.zeros_like(places[:, :1]), places + 1), dim=1))
        found = tree.tokens.tolist()
        new = [[*(row[node] for node in path), token] for row, path, token in zip(found, paths, tokens, strict=True)]
        return self._close(new, trunk, tree.depths.amax(1).tolist(), [tree.nodes] * len(texts))

    def keep(self, rows: list[int]) -> None:
        """Only these texts go on, in this order."""
        self.texts.keep(rows)
        self.chance.keep(rows)
        for cache in self.caches:
            cache.keep(rows)
        if self.drafter is not None:
            self.drafter.keep(rows)

    def join(self, other: "Batch") -> None:
        """The texts of another batch of the same model, settings and kind of drafter go on behind these. Called between rounds;
        the other one is used up."""
        self.texts.join(other.texts)
        self.chance.join(other.chance)
        for own, new in zip(self.caches, other.caches, strict=True):
            own.join(new)
        if self.drafter is not None:
            assert other.drafter is not None
            self.drafter.join(other.drafter)

    def _judge(self, proposal: Proposal, logits: torch.Tensor) -> list[list[int]]:
        """logits [B, γ+1, V] of the last known token and the drafts -> each text's new tokens."""
        verdict = verify(proposal, logits, self.sampling, self.chance)
        found = torch.cat((verdict.accepted.unsqueeze(1), verdict.token.unsqueeze(1), proposal.tokens), dim=1).tolist()
        return [[*drafted[:accepted], token] for accepted, token, *drafted in found]

    def _follow(self, tree: Tree, logits: torch.Tensor) -> tuple[list[list[int]], list[int]]:
        """logits [B, 1+m, V] of the last known token and the m nodes -> each text's accepted path, and the token behind it."""
        verdict = verify_tree(tree, logits, self.sampling, self.chance)
        return tree.paths(verdict.node), verdict.token.tolist()

    def _close(self, new: list[list[int]], trunk: TrunkPass, drafted: list[int], nodes: list[int]) -> list[Round]:
        """The texts go on with the tokens new[b], whose states but the last one's lead the trunk's."""
        rounds = self._extend(new, drafted, nodes)
        for cache in self.caches:
            cache.crop([known - 1 for known in self.texts.known])
        if self.drafter is not None:
            self.drafter.observe(self.texts, trunk)
        return rounds

    def _extend(self, new: list[list[int]], drafted: list[int], nodes: list[int]) -> list[Round]:
        self.texts.extend(new)
        return [Round(*made) for made in zip(new, drafted, nodes, strict=True)]


def verify(proposal: Proposal, logits: torch.Tensor, sampling: Sampling, source: Source) -> Verdict:
    """The trunk's logits [B, γ+1, V] of the last known token and the γ drafts, as greedy decoding or sampling asks."""
    counts = None if proposal.counts is None else torch.tensor(proposal.counts, device=logits.device)
    if sampling.greedy:
        return verify_greedy(proposal.tokens, logits, counts)
    if sampling.typical is not None:
        return verify_typical(proposal.tokens, sampling.probabilities(logits), *sampling.typical, source, counts)
    return verify_sampled(proposal.tokens, sampling.probabilities(logits), proposal.probabilities, source, counts)


def verify_tree(tree: Tree, logits: torch.Tensor, sampling: Sampling, source: Source) -> TreeVerdict:
    """The same for a tree: the trunk's logits [B, 1+m, V] of the last known token and the m nodes."""
    if sampling.greedy:
        return verify_followed(tree, logits.argmax(-1))
    p = sampling.probabilities(logits)
    if sampling.typical is not None:
        return verify_typical_tree(tree, p, *sampling.typical, source)
    return verify_followed(tree, draw(p, source)) if tree.probabilities is None else verify_drawn(tree, p, source)
