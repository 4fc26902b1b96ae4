"""Tokenizers, always as a Hugging Face tokenizers JSON: a trained byte-level BPE, plain bytes, or a file.

Byte-level, so every text has tokens and every token sequence has bytes. The end-of-document token closes every document,
as in GPT-2. Text that spells that token out is data, not the end of a document: `encoder.TextEncoder` sees to that.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mtp_dist.data.detokenizer import byte_alphabet
from mtp_dist.errors import UserError
from mtp_dist.regular_file import MIB, read_regular

END_OF_DOCUMENT = "<|endoftext|>"
# Names under which published tokenizers keep theirs (the third is DeepSeek's).
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")
# Ends of a turn in a chat (ChatML, Llama 3, Gemma): they end a document where a tokenizer has nothing else for it.
KNOWN_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
# What versions without `tokenizer.eos_token` looked for, in this order. Their datasets, runs and checkpoints do not name the end.
FORMER_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
LARGEST_VOCABULARY = 1 << 24  # each number up to the largest has a row of the embedding
LARGEST = 256 * MIB
"""Of a tokenizer.json; published ones of 256,000 tokens have 35 MiB."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
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
    """Token b is byte b; 256 is the end-of-document token.

    A byte-level BPE without merges. (Byte fallback, in which earlier versions wrote it, makes `Tokenizer.decode` replace a whole
    run of bytes for one that is no text.)
    """
    vocabulary = {character: value for value, character in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
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
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is not one, at some damage
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"tokenizer file {path} is not a tokenizers JSON ({' '.join(str(error).split())[:200]})") from error
    if (largest := vocabulary_size(tokenizer)) > LARGEST_VOCABULARY:
        raise UserError(f"tokenizer file {path} has token number {largest - 1}; the largest allowed is {LARGEST_VOCABULARY - 1}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest token number plus one (vocabularies may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_document(tokenizer: Tokenizer, name: str = "") -> tuple[str, int]:
    """Name and number of the token that ends a document, as a dataset or a run names it; without a name, the one that versions
    before `tokenizer.eos_token` chose. Raises UserError where the tokenizer does not have it."""
    for known in (name,) if name else FORMER_ENDS:
        number = tokenizer.token_to_id(known)
        if number is not None:
            return known, number
    raise UserError(f"the tokenizer has no end-of-document token {' or '.join((name,) if name else FORMER_ENDS)}")


def choose_end(tokenizer: Tokenizer, asked: str = "") -> str:
    """Name of the token that ends a document in a dataset to build: the one asked for, or the known one that is flagged special.

    Raises UserError where there is none, or several that may be meant.
    """
    if asked:
        if tokenizer.token_to_id(asked) is None:
            flagged = ", ".join(sorted(_flagged(tokenizer))[:8]) or "none"
            raise UserError(f"tokenizer.eos_token={asked} is not in the tokenizer; its special tokens are: {flagged}")
        if len(asked) == 1 or is_byte(asked):
            raise UserError(f"tokenizer.eos_token={asked} is a character, which text needs; name a token for control alone")
        return asked
    entries = tokenizer.get_vocab(with_added_tokens=True)
    for names in (_flagged(tokenizer), entries):
        for known in (KNOWN_ENDS, KNOWN_TURN_ENDS):
            found = [name for name in known if name in names]
            if len(found) > 1:
                raise UserError(
                    f"the tokenizer has several tokens that may end a document: {', '.join(found)}; "
                    f"name the right one: tokenizer.eos_token='{found[0]}'"
                )
            if found:
                return found[0]
    known_names = ", ".join((*KNOWN_ENDS, *KNOWN_TURN_ENDS))
    raise UserError(
        f"the tokenizer has no end-of-document token of a known name ({known_names}); name its own: tokenizer.eos_token=NAME"
    )


def with_end(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The same tokenizer with the token `name`, which it has, flagged special: decoding can then leave it out."""
    content = json.loads(tokenizer.to_str())
    added = {token["content"]: token for token in content["added_tokens"]}
    if name in added:
        added[name]["special"] = True
    else:
        as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token = {"id": tokenizer.token_to_id(name), "content": name, **as_it_is, "special": True}
        content["added_tokens"] = sorted([*content["added_tokens"], token], key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(content))


def is_byte(name: str) -> bool:
    """Whether a token is a byte, as tokenizers with byte fallback name them: text needs those."""
    return BYTE_TOKEN.fullmatch(name) is not None


def _flagged(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)
