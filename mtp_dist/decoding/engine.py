"""The decoding loop: texts that a model continues, so many side by side; where one ends, one that waits takes its place.

``batch`` has the rounds. Plain decoding is the same loop without drafts, so that a comparison of the two compares nothing else.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.batch import Batch, Round
from mtp_dist.decoding.draft_lengths import DraftLengths
from mtp_dist.decoding.drafters import build_drafter, draft_length, room
from mtp_dist.decoding.layout import ModelPart, open_model
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.stopping import StopStrings, StopWatch
from mtp_dist.model.chunk import Chunk


@dataclass(frozen=True, eq=False)
class NewText:
    """A text to be continued. prompt: one or more tokens; limit: new tokens at most; stops: strings that end it; generator: its
    own chance, where texts are sampled (None: torch's)."""

    prompt: list[int]
    limit: int
    stops: StopStrings | None = None
    generator: torch.Generator | None = None


Waiting = Callable[[int], Sequence[NewText]]
"""Where texts come from: called with a number of free places, it gives so many or fewer."""

Failed = Callable[[Sequence[NewText], Exception], object]
"""Told of new texts that cannot be begun, and why."""


@dataclass(frozen=True)
class Generated:
    """tokens: the continuation, without the prompt. drafts: which of them were accepted drafts. ending: "length",
    "end_of_document" (its token is the last one) or "stop_string" (the last token completes it)."""

    tokens: list[int]
    statistics: Statistics
    ending: str
    drafts: list[bool] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the model ended the text itself."""
        return self.ending == "end_of_document"


@dataclass(eq=False)
class Growing:
    """A text on its way: its number (texts are counted as they come), its tokens so far, and of those how many the latest
    forward gave.

    Whoever follows it may end it between two forwards by giving it an ``ending`` of his own; it then leaves the batch.
    """

    number: int
    text: NewText
    statistics: Statistics
    tokens: list[int] = field(default_factory=list)
    drafts: list[bool] = field(default_factory=list)
    """Which of the tokens were accepted drafts; the others are the trunk's own."""
    new: int = 0
    ending: str = ""
    watch: StopWatch | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.text.stops is not None:
            self.watch = self.text.stops.watch(self.text.prompt)

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
) -> Generated:
    """``generate_batch`` of one prompt."""
    text = NewText(prompt, config.max_new_tokens, generator=generator)
    return generate_batch(model, [text], config, end=end, vocabulary=vocabulary)[0]


def generate_batch(
    model: Chunk | ModelPart,
    texts: Sequence[NewText | list[int]],
    config: DecodeConfig,
    *,
    rows: int | None = None,
    end: int | None = None,
    vocabulary: int | None = None,
    draft_model: nn.Module | None = None,
    lengths: DraftLengths | None = None,
    progress: Callable[[Growing], object] | None = None,
) -> list[Generated]:
    """``continued`` of so many texts, all side by side unless ``rows`` says how many. A prompt alone goes on by at most
    ``config.max_new_tokens``."""
    given = [text if isinstance(text, NewText) else NewText(text, config.max_new_tokens) for text in texts]
    found = continued(
        model,
        given,
        config,
        rows=rows or len(given),
        longest=max(len(text.prompt) + text.limit for text in given),
        end=end,
        vocabulary=vocabulary,
        draft_model=draft_model,
        lengths=lengths,
        progress=progress,
    )
    return list(found)


def continued(
    model: Chunk | ModelPart,
    texts: Iterable[NewText],
    config: DecodeConfig,
    *,
    rows: int,
    longest: int,
    end: int | None = None,
    vocabulary: int | None = None,
    draft_model: nn.Module | None = None,
    lengths: DraftLengths | None = None,
    progress: Callable[[Growing], object] | None = None,
) -> Iterator[Generated]:
    """What becomes of the texts, in their order, each once it and all before it have ended; see ``grow``.

    ``progress`` is called after each forward with each text that took part.
    """
    remaining, ended, next_ = iter(texts), dict[int, Generated](), 0
    for growing in grow(
        model,
        lambda free: list(islice(remaining, free)),
        config,
        rows=rows,
        longest=longest,
        end=end,
        vocabulary=vocabulary,
        draft_model=draft_model,
        lengths=lengths,
    ):
        for text in growing:
            if progress is not None:
                progress(text)
            if text.ending:
                ended[text.number] = Generated(text.tokens, text.statistics, text.ending, text.drafts)
        while next_ in ended:
            yield ended.pop(next_)
            next_ += 1


@torch.inference_mode()
def grow(
    model: Chunk | ModelPart,
    waiting: Waiting,
    config: DecodeConfig,
    *,
    rows: int,
    longest: int,
    end: int | None = None,
    vocabulary: int | None = None,
    draft_model: nn.Module | None = None,
    lengths: DraftLengths | None = None,
    failed: Failed | None = None,
) -> Iterator[list[Growing]]:
    """Continue the texts that ``waiting`` gives, at most ``rows`` side by side; it is asked before each round that has free
    places. A prompt and its continuation have at most ``longest`` tokens. Ends when nothing grows and nothing waits.

    Yields after each forward the texts that took part in it, with their new tokens; one that has ended is among them for the
    last time. The pass over the prompts of new texts is a forward of theirs alone; then they join the others.

    ``config.mode`` is plain or speculative. ``end`` is the end-of-document token: it ends a text if ``config.stop_at_eos``, and
    separates documents for attention. ``vocabulary``: see ``DecodingModel``. ``draft_model``: needed where ``config.drafter`` is
    model. ``lengths``: what earlier calls with ``config.auto`` learnt. For what is timed see ``Statistics``; a text's seconds are
    its share of the time of the passes that it took part in, and of what lay between them.

    ``failed``: where the pass over new prompts raises, it is told, and the other texts go on; None: the exception ends them all,
    as one in any later pass does. Ranks that decode together take none: they would part.
    """
    assert failed is None or not isinstance(model, ModelPart)
    most = draft_length(config, model.depth)
    decoder = open_model(model, longest + room(config, model.depth) + 1, end=end, vocabulary=vocabulary)
    sampling, stop = Sampling.of(config), end if config.stop_at_eos else None
    if config.auto and lengths is None:
        lengths = DraftLengths(most)

    def begun(texts: Sequence[NewText]) -> Batch:
        if not all(text.prompt and len(text.prompt) + text.limit <= longest for text in texts):
            raise ValueError(f"a prompt has no token, or may become a text of more than {longest}")
        chance = Chance([text.generator for text in texts])
        drafter = build_drafter(decoder, len(texts), config, sampling, chance, other=draft_model) if most else None
        return Batch(decoder, [text.prompt for text in texts], sampling, drafter, chance)

    places, number = Places(), 0
    owed, started = 0.0, time.perf_counter()  # owed: by the next round, since it passed before the forward of new texts
    while True:
        free = rows - len(places.growing)
        new = waiting(free) if free else []
        if new:
            if places.growing:
                elapsed, started = _lap(started)
                owed += elapsed
            came = [Growing(number + place, text, Statistics(len(text.prompt))) for place, text in enumerate(new)]
            number += len(new)
            try:
                batch = begun(new)
                rounds = batch.start()
            except Exception as error:
                if failed is None:
                    raise
                failed(new, error)
                continue
            elapsed, started = _lap(started)
            for text, made in zip(came, rounds, strict=True):
                _take(text, made, stop)
                text.statistics.tokens, text.statistics.prefill_seconds = 1, elapsed / len(came)
            yield came
            places.admit(came, batch)
        elif not places.growing:
            return
        if places.batch is None:
            continue
        growing = places.growing
        left = max(text.text.limit - len(text.tokens) for text in growing) - 1
        decoder.moved()  # of prompts
        if config.auto and most and lengths is not None:
            count = decoder.agreed(lengths.choose(min(most, left)))
            begin = time.perf_counter()
            rounds = places.batch.advance(count)
            lengths.learn(count, [len(made.tokens) - 1 for made in rounds], time.perf_counter() - begin)
        else:
            # What a text draws must not depend on how long the others may become.
            rounds = places.batch.advance(min(most, left) if sampling.greedy else most)
        elapsed, started = _lap(started)
        moved = decoder.moved()
        for text, made in zip(growing, rounds, strict=True):
            _take(text, made, stop)
            text.statistics.move(*moved)
            _count(text.statistics, made, text.new, (elapsed + owed) / len(growing))
        owed = 0.0
        yield growing
        places.clear()


class Places:
    """The texts that grow, and their batch; None where there are none."""

    def __init__(self) -> None:
        self.growing: list[Growing] = []
        self.batch: Batch | None = None

    def admit(self, texts: list[Growing], batch: Batch) -> None:
        """These join, but for those that have ended."""
        going = [place for place, text in enumerate(texts) if not text.ending]
        if not going:
            return
        if len(going) < len(texts):
            batch.keep(going)
        if self.batch is None:
            self.batch = batch
        else:
            self.batch.join(batch)
        self.growing = [*self.growing, *(texts[place] for place in going)]

    def clear(self) -> None:
        """Those that have ended leave."""
        going = closed_up([place for place, text in enumerate(self.growing) if not text.ending])
        if not going:
            self.batch = None
        elif self.batch is not None and len(going) < len(self.growing):
            self.batch.keep(going)
        self.growing = [self.growing[place] for place in going]


def closed_up(places: list[int]) -> list[int]:
    """The same in another order: the last of them fill the gaps, so that the others stay where they are."""
    low = {place for place in places if place < len(places)}
    last = [place for place in places if place >= len(places)]
    return [place if place in low else last.pop() for place in range(len(places))]


def _lap(started: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - started, now


def _take(text: Growing, new: Round, stop: int | None) -> None:
    """Append what belongs to the text of a round's tokens; note why the text ends there, if it does."""
    seen, limit = len(text.tokens), text.text.limit
    tokens = until(new.tokens, stop)[: limit - seen]
    if stop is not None and tokens[-1] == stop:
        text.ending = "end_of_document"
    elif seen + len(tokens) == limit:
        text.ending = "length"
    cut = text.watch.feed(tokens) if text.watch is not None else None
    if cut is not None:
        tokens, text.ending = tokens[:cut], "stop_string"
    text.tokens, text.new = text.tokens + tokens, len(tokens)
    accepted = len(new.tokens) - 1
    text.drafts = text.drafts + [place < accepted for place in range(len(tokens))]


def _count(statistics: Statistics, new: Round, kept: int, seconds: float) -> None:
    accepted = min(len(new.tokens) - 1, kept)
    # Drafts behind the end of the text were never part of it.
    drafted, nodes = (accepted, accepted) if kept < len(new.tokens) else (new.drafted, new.nodes)
    statistics.count(drafted, accepted, kept, nodes)
    statistics.seconds += seconds


def until(tokens: list[int], stop: int | None) -> list[int]:
    """The tokens up to the first ``stop``, that one included."""
    return tokens[: tokens.index(stop) + 1] if stop is not None and stop in tokens else tokens
