"""Texts that wait and the one thread that decodes them, several together where their sampling is alike.

A batch begins with the oldest text that waits, and others behind it with the same temperature, top-k and top-p, which need not
have come with the same request. Its texts leave one by one, as each ends or is dropped. The oldest text that waits takes the free
place if it is of their kind; if not, nobody does, and it gets its turn once the batch has ended. Nobody who submits or drops is
kept waiting for the model.
"""

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol

import torch

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.engine import Failed, Growing, NewText, Waiting
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.stopping import StopStrings
from mtp_dist.serving.request import LARGEST_SEED

FAILED, CLOSED = "failed", "closed"
"""Endings of a text that has no completion: the decoder raised an exception; the worker was closed."""
_DROPPED = "dropped"

Kind = tuple[float, int, float]
"""Temperature, top-k and top-p."""


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

    @property
    def kind(self) -> Kind:
        """Texts of one kind can be decoded together."""
        return (self.temperature, self.top_k, self.top_p) if self.temperature else (0.0, 0, 1.0)


class Decoder(Protocol):
    """``decoding.engine.grow`` with a model, and the length of texts, bound to it."""

    def __call__(
        self, waiting: Waiting, config: DecodeConfig, *, rows: int, failed: Failed
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
        self.running: dict[NewText, Text] = {}
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
            return len(self.running), len(self.waiting)

    def refuse(self) -> None:
        """Take no more texts; those that are here go on."""
        with self.changed:
            self.open = False
            self.changed.notify()

    def close(self) -> None:
        """End what is here, with the ending ``CLOSED``, and the thread."""
        self.refuse()
        with self.changed:
            ended = [*self.waiting, *self.running.values()]
            for text in ended:
                if not text.dropped:
                    text.heard(Piece(text.index, [], CLOSED))
                text.dropped = True
            self.waiting.clear()
        self.thread.join()

    def _work(self) -> None:
        while kind := self._next():
            try:
                self._write(kind)
            except Exception as error:  # whatever it was, the next texts are not to blame for it
                self._fail(list(self.running), error)

    def _next(self) -> Kind | None:
        """The kind of the next batch, which is empty yet; None: it is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or not self.open)
            return self.waiting[0].kind if self.waiting else None

    def _take(self, kind: Kind, free: int) -> list[NewText]:
        """Texts of the kind that wait and may begin now; they run from here on."""
        with self.changed:
            alike = list(self.waiting) if not self.running else []
            if not alike or alike[0].kind != kind:
                alike = list(takewhile(lambda text: text.kind == kind, self.waiting))
            alike = [text for text in alike if text.kind == kind][:free]
            self.waiting = deque(text for text in self.waiting if text not in alike)
            begun = {NewText(text.prompt, text.limit, text.stops, self._generator(text)): text for text in alike}
            self.running |= begun
            return list(begun)

    def _write(self, kind: Kind) -> None:
        # Taken before the decoder is asked: should it fail at once, they fail with it, and are not tried for ever.
        first = self._take(kind, self.decode.batch)

        def waiting(free: int) -> list[NewText]:
            nonlocal first
            here, first = first, []
            return here or self._take(kind, free)

        temperature, top_k, top_p = kind
        config = replace(self.decode, temperature=temperature, top_k=top_k, top_p=top_p)
        for growing in self.decoder(waiting, config, rows=self.decode.batch, failed=self._fail):
            for grown in growing:
                text = self.running[grown.text]
                self._hand(grown.text, Piece(text.index, grown.latest, grown.ending, grown.statistics))
                if text.dropped and not grown.ending:
                    grown.ending = _DROPPED
                    with self.changed:
                        del self.running[grown.text]

    def _fail(self, texts: Sequence[NewText], error: Exception) -> None:
        """These end without a completion."""
        traceback.print_exception(error)
        for new in texts:
            self._hand(new, Piece(self.running[new].index, [], FAILED))

    def _hand(self, new: NewText, piece: Piece) -> None:
        """Hand a piece on, unless nobody waits for it; one with an ending is the text's last."""
        with self.changed:
            text = self.running[new]
            if not text.dropped:
                text.heard(piece)
            if piece.ending:
                del self.running[new]

    def _generator(self, text: Text) -> torch.Generator:
        """Texts of one request draw differently; its seed stands for the same texts again."""
        seed = secrets.randbelow(LARGEST_SEED) if text.seed is None else (text.seed + text.index) % (LARGEST_SEED + 1)
        return torch.Generator(self.device).manual_seed(seed)
