"""A text ends before its first stop string however that is cut into tokens; what is shown while it grows adds up to it; each
token is read once."""

import random
from typing import Any

import pytest

from mtp_dist.data import detokenizer
from mtp_dist.data.detokenizer import TextDecoder, decoded
from mtp_dist.data.tokenizer import byte_tokenizer, train_bpe
from mtp_dist.decoding.stopping import StopStrings, TextStream, text_of

TEXT = "né, 日本語 and\n\nmore ab aab aaab."
STOPS = [["\n\n"], ["aaab"], ["日本"], ["é, 日x", "more"], ["ab aab", "b a"], ["nowhere"], [], ["b aab a", "aab"], ["ab", "ab"]]


def before_the_first(text: str, strings: list[str]) -> str:
    """Character by character: before the string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        if complete := [string for string in strings if text[:end].endswith(string)]:
            return text[: end - max(map(len, complete))]
    return text


@pytest.mark.parametrize("strings", STOPS, ids=str)
@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_pieces_shown_are_the_text_before_the_first_string(strings: list[str], step: int) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(TEXT).ids
    stops = StopStrings(tokenizer, strings)
    stream, watch, shown, seen, end = TextStream(tokenizer, stops), stops.watch(), "", 0, None
    while seen < len(tokens) and end is None:
        found = watch.feed(tokens[seen : seen + step])
        end = None if found is None else seen + found
        assert stops.within(tokens[: seen + step], seen) == end
        piece = stream.feed(tokens[seen : seen + step if end is None else end])
        assert not any(string in shown + piece for string in strings)
        shown, seen = shown + piece, seen + step
    shown += stream.finish()
    assert shown == before_the_first(TEXT, strings) == stops.cut(TEXT)
    assert (end is None) == (shown == TEXT)
    if end is not None:
        # The last token kept is the one that completes a string: without it there is none yet.
        assert any(string in decoded(tokenizer, tokens[:end]) for string in strings)
        assert not any(string in decoded(tokenizer, tokens[: end - 1]) for string in strings)


def test_random_texts_and_strings() -> None:
    """Strings that overlap, hold each other and share beginnings; tokens of several characters; bytes that are no text."""
    chance, bpe, single = random.Random(5), train_bpe(["abab aabb baba abba é日 " * 50], 300), byte_tokenizer()
    ended = 0
    for _ in range(1500):
        tokenizer = chance.choice([bpe, single])
        text = "".join(chance.choices("aab é日", k=chance.randint(0, 40))).encode()
        tokens = tokenizer.encode(text.decode()).ids if chance.random() < 0.7 else [*text, *chance.choices(range(1, 256), k=5)]
        strings = ["".join(chance.choices("aab é", k=chance.randint(1, 6))) for _ in range(chance.randint(0, 4))]
        stops = StopStrings(tokenizer, strings)
        expected = before_the_first(decoded(tokenizer, tokens), strings)
        stream = TextStream(tokenizer, stops)
        shown = "".join(stream.feed([token]) for token in tokens) + stream.finish()
        assert shown == text_of(tokens, stops) == stops.cut(decoded(tokenizer, tokens)) == expected
        end = stops.watch().feed(tokens)
        assert (end is not None) == stream.stopped or decoded(tokenizer, tokens).endswith("\ufffd")
        steps = [found for seen in range(len(tokens)) if (found := stops.within(tokens[: seen + 1], seen)) is not None]
        assert steps[:1] == ([] if end is None else [end])
        ended += end is not None
    assert 300 < ended < 1400


def test_what_might_become_a_stop_string_waits() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, StopStrings(tokenizer, ["STOP"]))
    assert [stream.feed([token]) for token in b"aST"] == ["a", "", ""]
    assert stream.feed([ord("x")]) == "STx"
    assert stream.feed(list(b"ST")) == ""
    assert stream.finish() == "ST"


def test_bytes_that_are_no_text_hide_no_stop_string() -> None:
    tokenizer = byte_tokenizer()
    assert StopStrings(tokenizer, ["ab"]).within([255, 97, 98, 255], 0) == 3


def test_special_tokens_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.get_vocab_size() - 1
    assert StopStrings(tokenizer, ["ab"]).within([97, end, 98], 2) == 3
    assert TextStream(tokenizer, StopStrings(tokenizer, [])).feed([97, end, 98]) == "ab"


@pytest.mark.parametrize("stop", ["\n\n\n\n", "\U0001f600" * 256, "a" * 256])
def test_each_token_is_read_once(stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a text that ends at a string, and by its stream: whatever the string's length, and the text's."""
    read: list[int] = []
    of = detokenizer.TokenBytes.of

    def counted(self: Any, token: int, before: int | None) -> bytes:
        read.append(token)
        return of(self, token, before)

    monkeypatch.setattr(detokenizer.TokenBytes, "of", counted)
    tokenizer = byte_tokenizer()
    stops = StopStrings(tokenizer, [stop])
    tokens = list((stop[:-1] + "b").encode() * 4)
    watch, stream = stops.watch(tokens[:10]), TextStream(tokenizer, stops)
    for token in tokens:
        watch.feed([token])
    assert len(read) == 10 + len(tokens)
    for token in tokens:
        stream.feed([token])
    assert read[10:] == tokens * 2
    read.clear()
    # A text as it stands, asked about its last token: what the string may reach back to.
    stops.within(list(b"x" * 5000), 4999)
    assert len(read) <= 2 * 4 * (len(stop) + 1) + 1


def test_a_continuation_completes_the_prompts_last_character() -> None:
    tokenizer = byte_tokenizer()
    prompt, new = [97, 0xE6, 0x97], [0xA5, 98]
    stream = TextStream(tokenizer, StopStrings(tokenizer, ["日"]), prompt)
    assert (stream.prompt, stream.feed(new), stream.stopped) == ("a", "", True)
    assert StopStrings(tokenizer, ["日"]).watch(prompt).feed(new) == 1
    decoder = TextDecoder(tokenizer, prompt)
    assert decoder.prompt + decoder.feed(new) == "a日b"
