"""Any text survives its tokens; the end-of-document token is never made from text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from mtp_dist.data.encoder import TextEncoder
from mtp_dist.data.manifest import token_dtype
from mtp_dist.data.tokenizer import (
    END_OF_DOCUMENT,
    byte_tokenizer,
    end_of_document,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
)
from mtp_dist.errors import UserError

TEXT = "def lane(epoch):\n    return epoch  # λ, the weight\n" * 40


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer() if request.param == "bytes" else train_bpe([TEXT], 300)
    file = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_text_survives(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    text = text + END_OF_DOCUMENT + text
    numbers = TextEncoder.of_run(path, END_OF_DOCUMENT).encode(text, "a text")
    assert end_of_document(tokenizer)[1] not in numbers
    tokenizer.encode_special_tokens = True  # how earlier versions read prompts
    assert numbers == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(numbers, skip_special_tokens=False) == text


def test_the_tokenizer_alone_reads_the_name_of_the_end_as_the_end(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a" + END_OF_DOCUMENT).ids[-1] == end_of_document(tokenizer)[1]


def test_byte_tokens_are_bytes() -> None:
    text = "aλ\r\n🙂"
    tokenizer = byte_tokenizer()
    assert bytes(tokenizer.encode(text).ids) == text.encode()
    assert vocabulary_size(tokenizer) == 257
    assert end_of_document(tokenizer) == (END_OF_DOCUMENT, 256)


def test_a_bpe_has_the_size_asked_for_and_learns() -> None:
    tokenizer = train_bpe([TEXT], 280)
    assert vocabulary_size(tokenizer) == 280
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT.encode()) / 2


def test_saved_truncation_and_padding_do_not_cut_documents(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT).ids) == len(TEXT.encode())
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode("ab").ids) == 2


def test_the_vocabulary_counts_holes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 10


def test_other_families_end_tokens_are_found() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="no end-of-document token"):
        end_of_document(tokenizer)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    assert end_of_document(tokenizer) == ("</s>", 1)


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizers JSON"):
        load_tokenizer(tmp_path / "bad.json")


def test_tokens_fit_their_type() -> None:
    assert token_dtype(1 << 16) == "uint16"
    assert token_dtype((1 << 16) + 1) == "uint32"
