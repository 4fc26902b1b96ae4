"""Tokenizers, always as a Hugging Face tokenizers JSON: a trained byte-level BPE, plain bytes, or a file.

Byte-level, so every text has tokens and every token sequence has bytes. The end-of-document token closes every document,
as in GPT-2. Text that spells that token out is data, not the end of a document: `text_tokenizer` sees to that.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mtp_dist.errors import UserError
from mtp_dist.regular_file import MIB, read_regular

END_OF_DOCUMENT = "<|endoftext|>"
# Names under which published tokenizers keep theirs, in order of preference.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
LARGEST = 256 * MIB
"""Of a tokenizer.json; published ones of 256,000 tokens have 35 MiB."""
SMALLEST_BPE = 257  # the 256 byte values and the end-of-document token


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most `vocab_size` entries, the end-of-document token (number 0) included.

    Raises UserError where `vocab_size` has no room for the bytes.
    """
    if vocab_size < SMALLEST_BPE:
        raise UserError(f"tokenizer.vocab_size={vocab_size} is too small for a byte-level BPE; choose {SMALLEST_BPE} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_special(END_OF_DOCUMENT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b; 256 is the end-of-document token."""
    tokenizer = Tokenizer(models.BPE(vocab={f"<0x{value:02X}>": value for value in range(256)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([_special(END_OF_DOCUMENT)])
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, without any truncation or padding that was saved in it. Raises UserError where it cannot be read."""
    try:
        content = read_regular(path, LARGEST)
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist; name a tokenizer.json") from None
    except OSError as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error.strerror}") from None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer file {path} is not a tokenizers JSON ({str(error)[:200]})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def text_tokenizer(path: str | Path) -> Tokenizer:
    """As `load_tokenizer`, for text that is data: names of special tokens in it are encoded as ordinary text."""
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest token number plus one (vocabularies may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document(tokenizer: Tokenizer) -> tuple[str, int]:
    """Name and number of the token that ends a document. Raises UserError where the tokenizer has none that is known."""
    for name in KNOWN_ENDS:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return name, number
    raise UserError(f"tokenizer.path: the tokenizer has no end-of-document token; add one named {' or '.join(KNOWN_ENDS)}")


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)
