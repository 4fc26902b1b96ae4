"""No text yields the end of a document, whatever the tokenizer; and the end is the right token."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mtp_dist.config.schema import TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.encoder import TextEncoder
from mtp_dist.data.manifest import SPLITS
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.tokenizer import byte_tokenizer, choose_end, end_of_document, load_tokenizer, train_bpe, with_end
from mtp_dist.errors import UserError
from mtp_dist.generate import Writer
from tests.data.conftest import build_config

DEEPSEEK = "<｜end▁of▁sentence｜>"
LETTERS = "abcdefghijklmnopqrstuvwxyz</>|_[]E OS▁｜\n"


def unigram(end: str, **flags: bool) -> Tokenizer:
    """The end is a piece with the best score, as in sentence-piece models."""
    pieces = [("<unk>", 0.0), (end, 0.0), *((letter, -3.0) for letter in LETTERS if letter != end)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return added(tokenizer, end, **flags)


def word_level(end: str, **flags: bool) -> Tokenizer:
    words = ["[UNK]", end, "a", "word", "say"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return added(tokenizer, end, **flags)


def word_piece(end: str, **flags: bool) -> Tokenizer:
    words = ["[UNK]", end, "a", "word", "say", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return added(tokenizer, end, **flags)


def merging_bpe(end: str, **flags: bool) -> Tokenizer:
    """A BPE whose merges spell the end out."""
    steps = [end[:length] for length in range(1, len(end) + 1)]
    entries = list(dict.fromkeys([*LETTERS, *steps[1:]]))
    merges = [(left, end[len(left)]) for left in steps[:-1]]
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, merges))
    return added(tokenizer, end, **flags)


def byte_bpe(end: str, **flags: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    return added(tokenizer, end, **flags)


def added(tokenizer: Tokenizer, end: str, special: bool | None = True, normalized: bool = False) -> Tokenizer:
    if special is not None:
        tokenizer.add_tokens([AddedToken("<extra>", special=False), AddedToken(end, special=special, normalized=normalized)])
        tokenizer.add_special_tokens([AddedToken("<|after|>", special=True)])
    return tokenizer


MAKERS = [unigram, word_level, word_piece, merging_bpe, byte_bpe]


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", DEEPSEEK, "[EOS]"])
@pytest.mark.parametrize("special", [True, False, None], ids=["special", "added", "in the vocabulary"])
@pytest.mark.parametrize("make", MAKERS)
def test_no_text_yields_the_end(tmp_path: Path, make: Callable[..., Tokenizer], special: bool | None, end: str) -> None:
    if special is None and make is byte_bpe:
        pytest.skip("no such entry")
    tokenizer = make(end, special=special)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    end_id = tokenizer.token_to_id(end)
    texts = [end, f"a {end} word", f"say {end}", f"{end}{end}", f" {end}\n{end} ", "a word", f"<extra>{end}"]
    if special is not None or "▁" not in end:  # the pre-tokenizer divides there
        assert any(end_id in tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    encoder = TextEncoder(path, end_id)
    for text, tokens in zip(texts, encoder.encode_batch(texts, texts), strict=True):
        assert len(tokens)
        assert not (tokens == end_id).any()
        if make is byte_bpe:
            assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
        elif make in (merging_bpe, unigram) and "<extra>" not in text:
            spelt = "".join(str(tokenizer.id_to_token(token)) for token in tokens.tolist())
            assert spelt.replace("▁", " ").strip() == text.replace("▁", " ").strip()
        if end not in text:
            assert tokens.tolist() == load_tokenizer(path).encode(text, add_special_tokens=False).ids


def test_other_control_tokens_are_not_spelt_either(tmp_path: Path) -> None:
    tokenizer = unigram("</s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tokens,) = TextEncoder(tmp_path / "tokenizer.json", 1).encode_batch(["a<|after|>b<extra>"], ["x"])
    assert tokenizer.token_to_id("<|after|>") not in tokens
    assert tokenizer.token_to_id("<extra>") in tokens  # ordinary vocabulary, however it is matched


def test_single_characters_stay_text_whatever_their_flag(tmp_path: Path) -> None:
    tokenizer = unigram("</s>")
    tokenizer.add_special_tokens([AddedToken("\n", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tokens,) = TextEncoder(tmp_path / "tokenizer.json", 1).encode_batch(["a\nb"], ["x"])
    assert tokenizer.token_to_id("\n") in tokens


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(["some text <|endoftext|> of data"] * 9, 300)])
def test_our_own_tokenizers_encode_as_they_are(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    path = tmp_path / "tokenizer.json"
    make().save(str(path))
    plain = load_tokenizer(path)
    end_id = end_of_document(plain)[1]
    texts = ["some text", "λ\r\n🙂\0", ""]
    for text, tokens in zip(texts, TextEncoder(path, end_id).encode_batch(texts, texts), strict=True):
        assert tokens.dtype == np.int64
        assert tokens.tolist() == plain.encode(text).ids


def test_an_unknown_token_that_is_the_end_is_noticed_in_the_document(tmp_path: Path) -> None:
    """The one way that is left from text to the end: a character that the tokenizer does not have."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder(tmp_path / "tokenizer.json", 0)
    assert [tokens.tolist() for tokens in encoder.encode_batch(["a", "a a"], ["one", "two"])] == [[1], [1, 1]]
    with pytest.raises(UserError, match=r"document two: 'zebra' at character 2 becomes the end-of-document token.*unknown token"):
        encoder.encode_batch(["a", "a zebra"], ["one", "two"])


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="missing"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"document two has no tokens in this tokenizer \(.*Missing"):
        TextEncoder(tmp_path / "tokenizer.json", 0).encode_batch(["a", "b"], ["one", "two"])


def plain(*names: str, special: tuple[str, ...] = (), ordinary: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(("[UNK]", *names))}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ordinary])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (plain(special=("</s>",)), "</s>"),
        (plain(special=("<｜begin▁of▁sentence｜>", DEEPSEEK, "<|EOT|>")), DEEPSEEK),
        (plain(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")), "<|endoftext|>"),
        (plain(special=("<|im_start|>", "<|im_end|>")), "<|im_end|>"),
        (plain("<|endoftext|>", special=("</s>",)), "</s>"),
        (plain(special=("</s>",), ordinary=("<|endoftext|>",)), "</s>"),
        (plain("<|endoftext|>", "</s>", special=("<|im_end|>",)), "<|im_end|>"),
        (plain(special=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")), "<|end_of_text|>"),
        (plain(special=("<bos>", "<eos>", "<end_of_turn>")), "<eos>"),
        (plain(ordinary=("</s>",)), "</s>"),
        (plain("</s>"), "</s>"),
    ],
)
def test_the_end_is_the_known_name_that_is_flagged_special(tokenizer: Tokenizer, end: str) -> None:
    assert choose_end(tokenizer) == end


def test_several_ends_must_be_told_apart_by_the_setting() -> None:
    tokenizer = plain(special=("</s>", "<|endoftext|>"), ordinary=("<END>",))
    with pytest.raises(UserError, match=r"<\|endoftext\|>, </s>; name the right one: tokenizer\.eos_token="):
        choose_end(tokenizer)
    for name in ("</s>", "<|endoftext|>", "<END>", "[UNK]"):
        assert choose_end(tokenizer, name) == name
    with pytest.raises(
        UserError, match=r"tokenizer\.eos_token=<eos> is not in the tokenizer; its special tokens are: </s>, <\|endof"
    ):
        choose_end(tokenizer, "<eos>")
    with pytest.raises(UserError, match="of a known name"):
        choose_end(plain(special=("<END>",)))
    with pytest.raises(UserError, match="is a character, which text needs"):
        choose_end(plain("x"), "x")


def test_former_datasets_keep_the_end_that_they_were_built_with() -> None:
    tokenizer = plain("<|endoftext|>", special=("</s>",))
    assert end_of_document(tokenizer) == ("<|endoftext|>", 1)
    assert end_of_document(tokenizer, "</s>") == ("</s>", 2)
    with pytest.raises(UserError, match="no end-of-document token <eos>"):
        end_of_document(tokenizer, "<eos>")


@pytest.mark.parametrize("special", [True, False, None])
def test_the_end_is_flagged_in_the_dataset_s_tokenizer(special: bool | None) -> None:
    tokenizer = unigram("</s>", special=special)
    marked = with_end(tokenizer, "</s>")
    assert marked.get_vocab() == tokenizer.get_vocab()
    assert marked.get_added_tokens_decoder()[1].special
    assert marked.decode([10, 11, 1], skip_special_tokens=True) == tokenizer.decode([10, 11])


def stored(dataset: Dataset) -> list[np.ndarray]:
    return [
        sample.tokens
        for split in SPLITS
        for sample in SampleReader(dataset.splits[split]).read(0, dataset.splits[split].documents)
    ]


@pytest.mark.parametrize("special", [True, False, None])
def test_a_dataset_has_one_end_a_document(tmp_path: Path, special: bool | None) -> None:
    """Named by the setting, of a tokenizer whose known name is another one; the same when built again."""
    tokenizer = unigram("<END>", special=special)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_text("a<END>b </s> " * number + "c")
    settings = {"source": "text", "input": [str(tmp_path / "in")]}
    chosen = TokenizerConfig("file", str(tmp_path / "mine.json"), eos_token="<END>")
    dataset, fresh = build(build_config(tmp_path / "out", tokenizer=chosen, **settings))
    assert fresh
    assert (dataset.eos_token, dataset.eos_id) == ("<END>", 1)
    samples = stored(dataset)
    assert len(samples) == 20
    for tokens in samples:
        assert tokens[-1] == 1
        assert not (tokens[:-1] == 1).any()
    assert not build(build_config(tmp_path / "out", tokenizer=chosen, **settings))[1]
    other = TokenizerConfig("file", str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        build(build_config(tmp_path / "out", tokenizer=other, **settings))


def test_a_file_without_an_end_is_named_with_its_place(tmp_path: Path) -> None:
    plain("a").save(str(tmp_path / "mine.json"))
    chosen = TokenizerConfig("file", str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match=rf"tokenizer\.path={tmp_path}/mine\.json: .*tokenizer\.eos_token=NAME"):
        build(build_config(tmp_path / "out", source="python_stdlib", tokenizer=chosen))


def test_token_numbers_without_end_are_refused(tmp_path: Path) -> None:
    content = json.loads(plain("a").to_str())
    content["model"]["vocab"]["far"] = 2**32 - 1
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="token number 4294967295"):
        load_tokenizer(tmp_path / "mine.json")


def test_a_writer_ends_at_the_token_that_its_run_names(tmp_path: Path) -> None:
    tokenizer = plain("<|endoftext|>", special=("<END>",))
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def writer(eos_token: str) -> Writer:
        encoder = TextEncoder.of_run(tmp_path / "tokenizer.json", eos_token)
        return Writer(None, None, None, tokenizer, encoder, None, None, 0)  # type: ignore[arg-type]

    assert writer("<END>").told["end"] == 2
    assert writer("").told["end"] == 1  # a run of an earlier version
