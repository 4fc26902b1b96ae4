"""A text ends before its first stop string however that is cut into tokens, and what is shown while it grows adds up to it."""

import pytest

from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.stopping import StopStrings, TextStream

TEXT = "né, 日本語 and\n\nmore ab aab aaab."
STOPS = [["\n\n"], ["aaab"], ["日本"], ["é, 日x", "more"], ["ab aab", "b a"], ["nowhere"], []]


@pytest.mark.parametrize("strings", STOPS, ids=str)
@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_pieces_shown_are_the_text_before_the_first_string(strings: list[str], step: int) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(TEXT).ids
    stops = StopStrings(tokenizer, strings)
    stream, shown, seen, end = TextStream(tokenizer, stops), "", 0, None
    while seen < len(tokens) and end is None:
        grown = tokens[: seen + step]
        end = stops.within(grown, seen)
        piece = stream.feed(grown[seen : len(grown) if end is None else end])
        assert not any(string in shown + piece for string in strings)
        shown, seen = shown + piece, len(grown)
    shown += stream.finish(stops.cut(tokenizer.decode(tokens[:end])))
    # The string that is complete first, not the one that begins first: at its end the text stops growing.
    complete = next((n for n in range(len(TEXT)) if any(string in TEXT[:n] for string in strings)), None)
    if complete is None:
        assert end is None
        assert shown == TEXT
    else:
        assert shown == TEXT[: min(TEXT.index(string) for string in strings if string in TEXT[:complete])]
        # The last token kept is the one that completes a string: without it there is none yet.
        assert any(string in tokenizer.decode(tokens[:end]) for string in strings)
        assert not any(string in tokenizer.decode(tokens[: end - 1]) for string in strings)


def test_what_might_become_a_stop_string_waits() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, StopStrings(tokenizer, ["STOP"]))
    assert [stream.feed([token]) for token in b"aST"] == ["a", "", ""]
    assert stream.feed([ord("x")]) == "STx"
    assert stream.feed(list(b"ST")) == ""
    assert stream.finish("aSTxST") == "ST"


def test_bytes_that_are_no_text_hide_no_stop_string() -> None:
    tokenizer = byte_tokenizer()
    assert StopStrings(tokenizer, ["ab"]).within([255, 97, 98, 255], 0) == 3


def test_special_tokens_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.get_vocab_size() - 1
    assert StopStrings(tokenizer, ["ab"]).within([97, end, 98], 2) == 3
    assert TextStream(tokenizer, StopStrings(tokenizer, [])).feed([97, end, 98]) == "ab"
