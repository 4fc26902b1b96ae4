"""Texts that end at a string, and texts shown while they grow. Both look at text, since a string may be cut into tokens in many
ways."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopStrings:
    """Where a text ends: before the first of these strings."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token is a byte at least, but for special ones, which are no text.
        self.reach = max((len(string.encode()) for string in strings), default=0) + 4

    def within(self, tokens: list[int], seen: int) -> int | None:
        """How many of a text's tokens there are when its first string is complete; None where none is. The first ``seen`` tokens
        are known to complete none."""
        if not self.strings:
            return None
        return next((end for end in range(seen + 1, len(tokens) + 1) if self._completed(tokens[:end])), None)

    def cut(self, text: str) -> str:
        """The text before the first string."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else text

    def _completed(self, tokens: list[int]) -> bool:
        """From every token on: bytes before a string, of half a character or of none, may keep a tokenizer from reading it."""
        for start in range(max(len(tokens) - self.reach, 0), len(tokens)):
            text = self.tokenizer.decode(tokens[start:], skip_special_tokens=True)
            if any(string in text for string in self.strings):
                return True
        return False


class TextStream:
    """A text piece by piece, as its tokens come: whole characters only, nothing of a stop string, no special tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.shown, self.held, self.stopped = "", "", False

    def feed(self, tokens: list[int]) -> str:
        """What can be shown once these tokens have come, beside what was shown before."""
        for token in tokens:
            self.held += self.decoder.step(self.tokenizer, token) or ""
        if self.stopped:
            return ""
        shown = self.stops.cut(self.held)
        self.stopped = shown != self.held
        if not self.stopped:
            shown = shown[: len(shown) - self._pending()]
        self.shown, self.held = self.shown + shown, self.held[len(shown) :]
        return shown

    def finish(self, text: str) -> str:
        """The text has ended, and this is all of it: what was not shown, as it might have become a stop string, or was no whole
        character."""
        return text.removeprefix(self.shown) if text.startswith(self.shown) else ""

    def _pending(self) -> int:
        """Characters at the end that may become a stop string."""
        longest = max((len(string) for string in self.stops.strings), default=1) - 1
        ends = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in ends if any(string.startswith(self.held[-n:]) for string in self.stops.strings)), 0)
