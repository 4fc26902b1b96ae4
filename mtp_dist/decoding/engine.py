"""The decoding loop: draft, verify in one pass through the trunk, keep what is accepted and the trunk's own token after it.

Texts of a batch go on side by side, each as far as its own drafts are accepted; one that has ended leaves the batch. Plain
decoding is the same loop without drafts, so that a comparison of the two compares nothing else.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.draft_lengths import DraftLengths
from mtp_dist.decoding.drafter import Drafter, Proposal
from mtp_dist.decoding.drafters import build_drafter, draft_length, room
from mtp_dist.decoding.layout import ModelPart, open_model
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling, Source, draw
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.stopping import StopStrings
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Branches, Tree, filled
from mtp_dist.decoding.tree_verification import TreeVerdict, verify_drawn, verify_followed, verify_typical_tree
from mtp_dist.decoding.verification import Verdict, verify_greedy, verify_sampled, verify_typical
from mtp_dist.model.chunk import Chunk


@dataclass(frozen=True)
class Generated:
    """tokens: the continuation, without the prompt. ending: "length", "end_of_document" (its token is the last one) or
    "stop_string" (the last token completes it)."""

    tokens: list[int]
    statistics: Statistics
    ending: str

    @property
    def ended(self) -> bool:
        """Whether the model ended the text itself."""
        return self.ending == "end_of_document"


@dataclass(frozen=True)
class Round:
    """What one forward gave a text: ``tokens`` are the accepted drafts and one more; drafts of depths up to ``drafted`` were
    verified, ``nodes`` in all: where they form no tree, as many."""

    tokens: list[int]
    drafted: int
    nodes: int


@dataclass
class Growing:
    """A text of the batch: its number, how long it may become, its tokens so far, and of those how many the latest forward gave.

    Whoever follows it may end it between two forwards by giving it an ``ending`` of his own; it then leaves the batch.
    """

    number: int
    limit: int
    stops: StopStrings | None
    statistics: Statistics
    tokens: list[int] = field(default_factory=list)
    new: int = 0
    ending: str = ""

    @property
    def latest(self) -> list[int]:
        """The tokens of the latest forward."""
        return self.tokens[len(self.tokens) - self.new :]


def generate(
    model: Chunk | ModelPart,
    prompt: list[int],
    config: DecodeConfig,
    *,
    end: int | None = None,
    vocabulary: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Generated:
    """``generate_batch`` of one prompt; ``progress`` is called after each forward with the number of new tokens."""
    report = None if progress is None else lambda _, tokens: progress(len(tokens))
    return generate_batch(
        model, [prompt], config, end=end, vocabulary=vocabulary, generators=[generator], progress=report
    )[0]


def generate_batch(
    model: Chunk | ModelPart,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    *,
    end: int | None = None,
    vocabulary: int | None = None,
    generators: Sequence[torch.Generator | None] | None = None,
    stops: StopStrings | None = None,
    draft_model: nn.Module | None = None,
    lengths: DraftLengths | None = None,
    progress: Callable[[int, list[int]], object] | None = None,
) -> list[Generated]:
    """Continue prompts of one or more tokens, together, each by at most ``config.max_new_tokens``; see ``grow``.

    ``progress`` is called after each forward with a prompt's number and its new tokens.
    """
    results: dict[int, Generated] = {}
    for texts in grow(
        model,
        prompts,
        config,
        end=end,
        vocabulary=vocabulary,
        generators=generators,
        stops=[stops] * len(prompts),
        draft_model=draft_model,
        lengths=lengths,
    ):
        for text in texts:
            if progress is not None:
                progress(text.number, text.latest)
            if text.ending:
                results[text.number] = Generated(text.tokens, text.statistics, text.ending)
    return [results[number] for number in range(len(prompts))]


@torch.inference_mode()
def grow(
    model: Chunk | ModelPart,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    *,
    end: int | None = None,
    vocabulary: int | None = None,
    generators: Sequence[torch.Generator | None] | None = None,
    limits: Sequence[int] | None = None,
    stops: Sequence[StopStrings | None] | None = None,
    draft_model: nn.Module | None = None,
    lengths: DraftLengths | None = None,
) -> Iterator[list[Growing]]:
    """Continue prompts of one or more tokens, together. Yields after each forward the texts that took part in it, with their new
    tokens; one that has ended is among them for the last time.

    ``config.mode`` is plain or speculative. ``end`` is the end-of-document token: it ends a text if ``config.stop_at_eos``, and
    separates documents for attention. ``vocabulary``: see ``DecodingModel``. ``generators``: one a prompt, for sampling; None
    takes torch's own. ``limits``: tokens of each text at most, instead of ``config.max_new_tokens``. ``stops``: strings that end
    each text. ``draft_model``: needed where ``config.drafter`` is model. ``lengths``: what earlier calls with ``config.auto``
    learnt. For what is timed see ``Statistics``; a text's seconds are its share of the time of the passes that it took part in.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt has no token")
    growing = [
        Growing(number, limit, strings, Statistics(prompt_tokens=len(prompt)))
        for number, (prompt, limit, strings) in enumerate(
            zip(prompts, limits or [config.max_new_tokens] * len(prompts), stops or [None] * len(prompts), strict=True)
        )
    ]
    most = draft_length(config, model.depth)
    longest = max(len(prompt) + text.limit for prompt, text in zip(prompts, growing, strict=True))
    decoder = open_model(model, longest + room(config, model.depth) + 1, end=end, vocabulary=vocabulary)
    sampling, chance = Sampling.of(config), Chance(generators or [None] * len(prompts))
    drafter = build_drafter(decoder, len(prompts), config, sampling, chance, other=draft_model) if most else None
    batch = Batch(decoder, prompts, sampling, drafter, chance)
    if config.auto and lengths is None:
        lengths = DraftLengths(most)
    stop = end if config.stop_at_eos else None

    started = time.perf_counter()
    rounds = batch.start()
    while True:
        elapsed, started = _lap(started)
        for text, new in zip(growing, rounds, strict=True):
            first = not text.tokens
            _take(text, new, stop)
            _count(text.statistics, new, text.new, elapsed / len(growing), first=first)
        yield growing
        going = [place for place, text in enumerate(growing) if not text.ending]
        if not going:
            return
        if len(going) < len(growing):
            batch.keep(going)
            growing = [growing[place] for place in going]
        count = min(most, max(text.limit - len(text.tokens) for text in growing) - 1)
        if config.auto and most and lengths is not None:
            count = decoder.agreed(lengths.choose(count))
            begun = time.perf_counter()
            rounds = batch.advance(count)
            lengths.learn(count, [len(new.tokens) - 1 for new in rounds], time.perf_counter() - begun)
        else:
            rounds = batch.advance(count)


def _lap(started: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - started, now


def _take(text: Growing, new: Round, stop: int | None) -> None:
    """Append what belongs to the text of a round's tokens; note why the text ends there, if it does."""
    seen = len(text.tokens)
    tokens = text.tokens + until(new.tokens, stop)[: text.limit - seen]
    if stop is not None and tokens[-1] == stop:
        text.ending = "end_of_document"
    elif len(tokens) == text.limit:
        text.ending = "length"
    cut = text.stops.within(tokens, seen) if text.stops is not None else None
    if cut is not None:
        tokens, text.ending = tokens[:cut], "stop_string"
    text.tokens, text.new = tokens, len(tokens) - seen


def _count(statistics: Statistics, new: Round, kept: int, seconds: float, *, first: bool) -> None:
    if first:
        statistics.tokens = 1
        statistics.prefill_seconds = seconds
        return
    accepted = min(len(new.tokens) - 1, kept)
    # Drafts behind the end of the text were never part of it.
    drafted, nodes = (accepted, accepted) if kept < len(new.tokens) else (new.drafted, new.nodes)
    statistics.count(drafted, accepted, kept, nodes)
    statistics.seconds += seconds


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


def until(tokens: list[int], stop: int | None) -> list[int]:
    """The tokens up to the first ``stop``, that one included."""
    return tokens[: tokens.index(stop) + 1] if stop is not None and stop in tokens else tokens
