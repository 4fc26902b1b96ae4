"""Texts that end at a string, and texts shown while they grow.

Both look at characters, since a string may be cut into tokens in many ways, and both read each token once: what a token
costs does not depend on how long the text, or the longest string, is. A text ends before the string that is complete first; of
several that are complete with the same character, before the longest.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from mtp_dist.data.detokenizer import TextDecoder, TokenBytes


class StopStrings:
    """Where a text ends: before the first of these strings."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.automaton = Automaton(self.strings)

    def watch(self, prompt: Sequence[int] = ()) -> "StopWatch":
        """For one text, whose tokens follow those of a prompt."""
        return StopWatch(self, prompt)

    def within(self, tokens: Sequence[int], seen: int) -> int | None:
        """How many of a text's tokens there are when its first string is complete; None where none is. The first ``seen`` tokens
        are known to complete none.

        For a text as it stands; it reads as many earlier tokens as the longest string may reach back. ``watch`` reads none twice.
        """
        if not self.strings:
            return None
        start = self._reached(tokens, seen)
        found = self.watch().feed(tokens[start:])
        return None if found is None else start + found

    def cut(self, text: str) -> str:
        """The text before the first string."""
        found = [(place + len(string), place) for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(found)[1]] if found else text

    def _reached(self, tokens: Sequence[int], seen: int) -> int:
        """The first token that a string which is complete after ``seen`` tokens may begin in."""
        # A character has at most 4 bytes; one more may be cut where the reading begins.
        read, pieces, place = 4 * (max(map(len, self.strings)) + 1), TokenBytes(self.tokenizer), seen
        while place and read > 0:
            place -= 1
            read -= len(pieces.of(tokens[place], tokens[place - 1] if place else None))
        return place


class StopWatch:
    """Follows one text and says where its first stop string is complete."""

    def __init__(self, stops: StopStrings, prompt: Sequence[int]) -> None:
        self.decoder = TextDecoder(stops.tokenizer, prompt if stops.strings else ())
        self.automaton, self.state = stops.automaton, 0

    def feed(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens, which come next, there are when the first string is complete; None where none is yet."""
        if not self.automaton.strings:
            return None
        for number, token in enumerate(tokens, start=1):
            for character in self.decoder.feed([token]):
                self.state = self.automaton.step(self.state, character)
                if self.automaton.complete[self.state]:
                    return number
        return None


class TextStream:
    """A text piece by piece, as its tokens come behind a prompt's: whole characters only, nothing of a stop string, no special
    tokens. ``prompt``: the prompt's own text, as these tokens go on from it; ``held``: characters that may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings, prompt: Sequence[int] = ()) -> None:
        self.decoder, self.automaton = TextDecoder(tokenizer, prompt), stops.automaton
        self.prompt = self.decoder.prompt
        self.state, self.held, self.stopped = 0, "", False

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be shown once these tokens have come, beside what was shown before."""
        return self._shown(self.decoder.feed(tokens))

    def finish(self) -> str:
        """The text has ended: what was not shown, as it might have become a stop string, or was no whole character."""
        shown = self._shown(self.decoder.finish())
        rest, self.held = self.held, ""
        return shown + rest

    def _shown(self, text: str) -> str:
        if self.stopped:
            return ""
        known = self.held + text
        if not self.automaton.strings:
            return known
        for place, character in enumerate(text, start=len(self.held) + 1):
            self.state = self.automaton.step(self.state, character)
            if length := self.automaton.complete[self.state]:
                self.stopped, self.held = True, ""
                return known[: place - length]
        shown = known[: len(known) - self.automaton.depth[self.state]]
        self.held = known[len(shown) :]
        return shown


def text_of(tokens: Sequence[int], stops: StopStrings, prompt: Sequence[int] = ()) -> str:
    """The whole text that these tokens add to a prompt's: what a stream of them shows."""
    stream = TextStream(stops.tokenizer, stops, prompt)
    return stream.feed(tokens) + stream.finish()


class Automaton:
    """Finds the first of several strings in text that comes a character at a time, in constant time a character on average
    (A. Aho and M. Corasick, Communications of the ACM 18, 1975).

    A state is a node of the tree of all prefixes: the longest prefix of a string that the text ends with. ``depth``: its length;
    ``complete``: the length of the longest string that ends there, or 0.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self.children: list[dict[str, int]] = [{}]
        self.depth, self.complete, self.shorter = [0], [0], [0]
        for string in strings:
            self._add(string)
        order = list(self.children[0].values())
        for node in order:  # ascending depth: what a node falls back to is known before
            for character, child in self.children[node].items():
                self.shorter[child] = self.step(self.shorter[node], character)
                self.complete[child] = self.complete[child] or self.complete[self.shorter[child]]
                order.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self.children[state]:
            state = self.shorter[state]
        return self.children[state].get(character, 0)

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            if character not in self.children[node]:
                self.children[node][character] = len(self.children)
                self.children.append({})
                self.depth.append(self.depth[node] + 1)
                self.complete.append(0)
                self.shorter.append(0)
            node = self.children[node][character]
        self.complete[node] = len(string)
