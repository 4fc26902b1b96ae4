"""Texts that wait and the one thread that decodes them, several together where their sampling is alike.

A batch is what waits when the one before has ended: the oldest text, and others behind it with the same temperature, top-k and
top-p, which need not have come with the same request. Its texts leave one by one, as each ends or is dropped. Nobody who submits
or drops is kept waiting for the model.
"""

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.engine import Growing, NewText, Waiting
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.stopping import StopStrings
from mtp_dist.serving.request import LARGEST_SEED

FAILED, CLOSED = "failed", "closed"
"""Endings of a text that has no completion: the decoder raised an exception; the worker was closed."""
_DROPPED = "dropped"


@dataclass(frozen=True)
class Piece:
    """What one forward gave a text: its new tokens; where it has ended with them, why, and its counts."""

    index: int
    tokens: list[int]
    ending: str = ""
    statistics: Statistics | None = None


@dataclass(eq=False)
class Text:
    """A text to be written. ``heard`` is called in the worker's thread, last with a piece that has an ending, unless the text was
    dropped before."""

    index: int
    prompt: list[int]
    limit: int
    temperature: float
    top_k: int
    top_p: float
    stops: StopStrings
    seed: int | None
    heard: Callable[[Piece], object]
    dropped: bool = field(default=False, init=False)
    left: bool = field(default=False, init=False)

    @property
    def kind(self) -> tuple[float, int, float]:
        """Texts of one kind can be decoded together."""
        return (self.temperature, self.top_k, self.top_p) if self.temperature else (0.0, 0, 1.0)


class Decoder(Protocol):
    """``decoding.engine.grow`` with a model bound to it."""

    def __call__(
        self,
        waiting: Waiting,
        config: DecodeConfig,
        *,
        rows: int,
        longest: int,
    ) -> Iterator[list[Growing]]: ...


class FullError(Exception):
    """There is no room for more waiting texts."""


class ClosedError(Exception):
    """No text is taken any more."""


class Worker:
    """Decodes with ``decode.batch`` texts together at most; ``room``: texts that may wait."""

    def __init__(self, decoder: Decoder, decode: DecodeConfig, room: int, device: torch.device) -> None:
        self.decoder, self.decode, self.room, self.device = decoder, decode, room, device
        self.changed = threading.Condition()
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        self.open = True
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    def start(self) -> None:
        """Called once, first."""
        self.thread.start()

    def submit(self, texts: Sequence[Text]) -> None:
        """All of them, or none. Raises FullError or ClosedError."""
        with self.changed:
            if not self.open:
                raise ClosedError
            if len(self.waiting) + len(texts) > self.room:
                raise FullError
            self.waiting.extend(texts)
            self.changed.notify()

    def drop(self, texts: Sequence[Text]) -> None:
        """Nobody waits for these any more: those that wait leave at once, those that run after the forward of the moment."""
        with self.changed:
            for text in texts:
                text.dropped = True
            self.waiting = deque(text for text in self.waiting if not text.dropped)

    def counts(self) -> tuple[int, int]:
        """Texts that run, and that wait."""
        with self.changed:
            return sum(not text.left for text in self.running), len(self.waiting)

    def refuse(self) -> None:
        """Take no more texts; those that are here go on."""
        with self.changed:
            self.open = False
            self.changed.notify()

    def close(self) -> None:
        """End what is here, with the ending ``CLOSED``, and the thread."""
        self.refuse()
        with self.changed:
            ended = [*self.waiting, *(text for text in self.running if not text.left)]
            for text in ended:
                if not text.dropped:
                    text.heard(Piece(text.index, [], CLOSED))
                text.dropped = True
            self.waiting.clear()
        self.thread.join()

    def _work(self) -> None:
        while texts := self._together():
            try:
                self._write(texts)
            except Exception:  # whatever it was, the next texts are not to blame for it
                traceback.print_exc()
                for text in texts:
                    self._hand(text, Piece(text.index, [], FAILED))

    def _together(self) -> list[Text]:
        """The texts of the next batch; none: it is over."""
        with self.changed:
            self.running = []
            self.changed.wait_for(lambda: self.waiting or not self.open)
            alike = [text for text in self.waiting if text.kind == self.waiting[0].kind][: self.decode.batch]
            self.waiting = deque(text for text in self.waiting if text not in alike)
            self.running = alike
            return alike

    def _write(self, texts: list[Text]) -> None:
        temperature, top_k, top_p = texts[0].kind
        new = [NewText(text.prompt, text.limit, text.stops, self._generator(text)) for text in texts]
        growth = self.decoder(
            lambda free: [new.pop(0) for _ in range(min(free, len(new)))],
            replace(self.decode, temperature=temperature, top_k=top_k, top_p=top_p),
            rows=len(texts),
            longest=max(len(text.prompt) + text.limit for text in texts),
        )
        for growing in growth:
            for grown in growing:
                text = texts[grown.number]
                self._hand(text, Piece(text.index, grown.latest, grown.ending, grown.statistics))
                if text.dropped and not grown.ending:
                    grown.ending, text.left = _DROPPED, True

    def _hand(self, text: Text, piece: Piece) -> None:
        """Hand a piece on, unless nobody waits for it; one with an ending is the text's last."""
        with self.changed:
            if not text.left and not text.dropped:
                text.heard(piece)
            text.left = text.left or bool(piece.ending)

    def _generator(self, text: Text) -> torch.Generator:
        """Texts of one request draw differently; its seed stands for the same texts again."""
        seed = secrets.randbelow(LARGEST_SEED) if text.seed is None else (text.seed + text.index) % (LARGEST_SEED + 1)
        return torch.Generator(self.device).manual_seed(seed)
