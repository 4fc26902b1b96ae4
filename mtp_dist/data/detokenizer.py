"""From tokens to text, as the tokens come: the one decoder behind everything that shows, cuts or compares text.

    decoder = TextDecoder(tokenizer, prompt)
    decoder.feed([104, 105]) + decoder.feed([0xC3]) + decoder.finish()

Every token stands for bytes, and the bytes are read as UTF-8: a character whose bytes are still coming waits for them, and bytes
that belong to none become U+FFFD, one for each maximal part of a character (Unicode 15, section 3.9; what Python and Rust do).
So the pieces join to the same text however the tokens were dealt out, and one bad byte costs one character. `Tokenizer.decode`
promises neither: with byte fallback it replaces the whole run of bytes, and it cannot know that more are coming.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that byte-level tokenizers write it as: itself where it can be printed, else one from U+0100 on
    (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in printable)
    return {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(others)}


_BYTE_OF = {character: value for value, character in byte_alphabet().items()}


class TokenBytes:
    """What each token of a tokenizer adds to a text, in bytes. Special tokens add nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._steps = _steps(tokenizer)
        # Added tokens are spelt as they are, not in the byte alphabet.
        self._known = {number: token.content.encode() for number, token in added.items()} if "ByteLevel" in self._steps else {}

    def special(self, token: int) -> bool:
        """Whether the token is no text."""
        return token in self._special

    def of(self, token: int, before: int | None) -> bytes:
        """The bytes of a token that follows ``before``, a token that is not special; None: it begins the text."""
        if token in self._special:
            return b""
        found = self._known.get(token)
        if found is None and (found := self._alone(token)) is not None:
            self._known[token] = found
        return self._beside(token, before) if found is None else found

    def _alone(self, token: int) -> bytes | None:
        """The bytes of a token whose neighbours do not matter; None for any other."""
        spelt = self.tokenizer.id_to_token(token)
        if spelt is None:  # a row of the embedding that no token has
            return b""
        if "ByteLevel" in self._steps:
            values = [_BYTE_OF.get(character) for character in spelt]
            return spelt.encode() if None in values else bytes(value for value in values if value is not None)
        if "ByteFallback" in self._steps and (match := _BYTE.fullmatch(spelt)):
            return bytes([int(match[1], 16)])
        return None

    def _beside(self, token: int, before: int | None) -> bytes:
        """Word-piece and sentence-piece decoders join a token to the one before it; none looks further back."""
        if before is None:
            return self._decode([token]).encode()
        both, first = self._decode([before, token]), self._decode([before])
        return (both.removeprefix(first) if both.startswith(first) else self._decode([token])).encode()

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class TextDecoder:
    """The text that tokens add to that of a prompt (none: they begin a text). ``prompt``: the prompt's own text, but for a last
    character whose bytes the next tokens may complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._before: int | None = None
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.prompt = self.feed(prompt)

    def feed(self, tokens: Sequence[int]) -> str:
        """The characters that are complete once these tokens have come, beside those before. Costs O(len(tokens))."""
        found = []
        for token in tokens:
            found.append(self._bytes.of(token, self._before))
            if not self._bytes.special(token):
                self._before = token
        return self._characters.decode(b"".join(found))

    def finish(self) -> str:
        """The text has ended: U+FFFD for a character that never was completed, or nothing."""
        return self._characters.decode(b"", final=True)


def decoded(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    """The whole text that tokens add to a prompt's."""
    decoder = TextDecoder(tokenizer, prompt)
    return decoder.feed(tokens) + decoder.finish()


def _steps(tokenizer: Tokenizer) -> set[str]:
    """The kinds of decoders that a tokenizer chains."""
    if tokenizer.decoder is None:
        return set()
    waiting: list[dict[str, Any]] = [json.loads(tokenizer.decoder.__getstate__())]
    found = set()
    while waiting:
        step = waiting.pop()
        found.add(str(step.get("type")))
        waiting += step.get("decoders", [])
    return found
