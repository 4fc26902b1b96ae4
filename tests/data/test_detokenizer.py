"""Tokens become the same text however they are dealt out, one bad byte costs one character, and for every kind of tokenizer a
text survives its tokens."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mtp_dist.data.detokenizer import TextDecoder, byte_alphabet, decoded
from mtp_dist.data.tokenizer import END_OF_DOCUMENT, byte_tokenizer, train_bpe

BYTES = {f"<0x{value:02X}>": value for value in range(256)}


def fallback_bytes() -> Tokenizer:
    """As earlier versions wrote the byte tokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab=BYTES, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Llama 2's kind: words begin with a mark, unknown characters are bytes, the first mark of a text is no space."""
    pieces = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    vocabulary = BYTES | {piece: 256 + number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def expected(values: list[int]) -> str:
    return bytes(value for value in values if value < 256).decode(errors="replace")


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_bytes, lambda: train_bpe([""], 257)], ids=["bytes", "old", "bpe"])
def test_random_bytes(make: Callable[[], Tokenizer]) -> None:
    """3,000 random sequences, streamed token by token, in pieces, and whole; good text, cut characters, end tokens between."""
    tokenizer, chance = make(), random.Random(1)
    number = {value: tokenizer.token_to_id(spelt) for value, spelt in byte_alphabet().items()}
    if None in number.values():
        number = {value: tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    number[256] = tokenizer.token_to_id(END_OF_DOCUMENT)
    good = list("aé日🙂 \n".encode())
    damaged = 0
    for _ in range(3000):
        values = [value for _ in range(chance.randint(0, 6)) for value in chance.choice([good, good[: chance.randint(0, 10)]])]
        for _ in range(chance.randint(0, 3)):
            values.insert(
                chance.randint(0, len(values)), chance.choice([0xC3, 0xE6, 0xF0, 0x80, 0xFF, 256, chance.randrange(256)])
            )
        tokens, text = [number[value] for value in values], expected(values)
        stream, pieces, start = TextDecoder(tokenizer), [], 0
        while start < len(tokens):
            step = chance.randint(1, 3)
            pieces.append(stream.feed(tokens[start : start + step]))
            start += step
        single = TextDecoder(tokenizer)
        assert "".join(single.feed([token]) for token in tokens) + single.finish() == text
        assert "".join(pieces) + stream.finish() == text == decoded(tokenizer, tokens)
        damaged += "\ufffd" in text
    assert 500 < damaged < 2900


def test_the_byte_tokenizers_own_decoder_replaces_bad_bytes_alone() -> None:
    """It is what other programs read an exported model with."""
    tokenizer, chance = byte_tokenizer(), random.Random(2)
    assert tokenizer.decode([*b"deja vu", 0xC3]) == "deja vu\ufffd"
    for _ in range(300):
        values = chance.choices([*range(257), *"é日".encode()], k=20)
        assert tokenizer.decode(values, skip_special_tokens=True) == expected(values)


@pytest.mark.parametrize("text", ["a b ab", "ab é日 a", " a", "é a", "b\n🙂b"])
def test_pieces_of_sentences(text: str) -> None:
    """A continuation keeps the space that a text's beginning loses."""
    tokenizer = sentence_pieces()
    tokens = tokenizer.encode(text).ids
    assert decoded(tokenizer, tokens) == text
    for cut in range(len(tokens) + 1):
        decoder = TextDecoder(tokenizer, tokens[:cut])
        assert decoder.prompt + "".join(decoder.feed([token]) for token in tokens[cut:]) + decoder.finish() == text
    assert decoded(tokenizer, [*tokens, 0xC3, *tokenizer.encode("a b").ids]) == f"{text}\ufffd a b"


def test_word_pieces_and_words() -> None:
    pieces = Tokenizer(models.WordPiece({"un": 0, "##able": 1, "do": 2, "[UNK]": 3, ".": 4}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    words = Tokenizer(models.WordLevel({"un": 0, "able": 1, "do": 2}, unk_token="un"))
    ending = Tokenizer(models.BPE(vocab={"un": 0, "able</w>": 1, "do</w>": 2}, merges=[]))
    ending.decoder = decoders.BPEDecoder(suffix="</w>")
    for tokenizer, text in ((pieces, "do unable do"), (words, "do un able do"), (ending, "do unable do")):
        tokens = [2, 0, 1, 2]
        assert decoded(tokenizer, tokens) == text == tokenizer.decode(tokens)
        decoder = TextDecoder(tokenizer)
        assert "".join(decoder.feed([token]) for token in tokens) + decoder.finish() == text


def test_added_tokens_are_spelt_as_they_are() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["é fox", "naïve"])
    tokens = tokenizer.encode("a é fox, naïve.").ids
    assert {257, 258} < set(tokens)
    assert decoded(tokenizer, tokens) == "a é fox, naïve."


def test_rows_that_no_token_has_add_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert decoded(tokenizer, [97, 300, 98]) == "ab"


def test_the_pre_tokenizer_and_the_table_agree() -> None:
    assert sorted(byte_alphabet().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
