"""Text, of documents and prompts, to tokens: whatever it spells, no end of a document and no other control token comes out.

A tokenizer.json can make a control token from text in three ways: as an added token that is looked for in the text, as an entry
of the model's own vocabulary (a WordLevel word, a Unigram piece, a product of BPE merges), and as the unknown token. So the
encoder works with a copy in which those tokens have names that nobody can know, drawn anew for each copy. Numbers stay the same.
"""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from mtp_dist.data.tokenizer import end_of_document, is_byte, load_tokenizer
from mtp_dist.errors import UserError


class TextEncoder:
    """Encodes documents and prompts with the tokenizer at `path`, such that no text yields `end_id`."""

    def __init__(self, path: str | Path, end_id: int) -> None:
        self.end_id = end_id
        self._tokenizer = _without_control_tokens(load_tokenizer(path), end_id)

    @classmethod
    def of_run(cls, path: str | Path, eos_token: str) -> "TextEncoder":
        """For prompts, with the end as a run's settings name it. Raises UserError where the tokenizer does not have it."""
        return cls(path, end_of_document(load_tokenizer(path), eos_token)[1])

    def encode(self, text: str, name: str) -> list[int]:
        """The tokens of a prompt; `name` says which it is. Raises UserError where it has none, or where a character that the
        tokenizer does not have becomes the end token."""
        tokens: list[int] = self._encoded(text, name, "leave out what it does not have").ids
        if not tokens:
            raise UserError(f"{name} has no token in this tokenizer; give a longer text")
        if self.end_id in tokens:
            raise UserError(
                f"{name}: {self._culprit(text)} is not in the tokenizer, whose unknown token is the end-of-document token; "
                "leave it out"
            )
        return tokens

    def encode_batch(self, texts: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, int64, without an end. `names` says where each is from.

        Raises UserError where a text has no tokens, or none but the end token, which the tokenizer gives unknown characters.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception:  # the library raises bare Exception, and does not say for which text
            way_out = "use one that has all characters"
            encodings = [self._encoded(text, f"document {name}", way_out) for text, name in zip(texts, names, strict=True)]
        found = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        for name, text, tokens in zip(names, texts, found, strict=True):
            if (tokens == self.end_id).any():
                raise UserError(
                    f"document {name}: {self._culprit(text)} becomes the end-of-document token, which is the tokenizer's unknown "
                    "token too; name another end by tokenizer.eos_token, or use a tokenizer that has all characters"
                )
        return found

    def _encoded(self, text: str, name: str, way_out: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(f"{name} has no tokens in this tokenizer ({said}); {way_out}") from error

    def _culprit(self, text: str) -> str:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        start, stop = encoding.offsets[encoding.ids.index(self.end_id)]
        return f"{text[start : max(stop, start + 1)][:20]!r} at character {start}"


def _without_control_tokens(tokenizer: Tokenizer, end_id: int) -> Tokenizer:
    """A copy in which no text reaches `end_id`, nor any other token that is flagged special."""
    content = json.loads(tokenizer.to_str())
    model: dict[str, Any] = content["model"]
    control = [token["content"] for token in content["added_tokens"] if token["special"] and _control(token["content"])]
    # A name for each: 128 random bits, which no text can spell.
    hidden = {name: f"\ue000{secrets.token_hex(16)}" for name in (tokenizer.id_to_token(end_id), *control)}
    for token in content["added_tokens"]:
        if token["content"] in hidden:
            token |= {"content": hidden[token["content"]], "special": True, "normalized": False}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [pair for pair in model["merges"] if not _touches(pair, prefix, hidden)]
    # It would only add special tokens, and refers to them by name.
    content["post_processor"] = None
    copy = Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    numbers = tokenizer.get_vocab(with_added_tokens=True).items()
    if copy.get_vocab(with_added_tokens=True) != {hidden.get(name, name): number for name, number in numbers}:
        raise UserError("the numbers of the tokenizer's special tokens cannot be kept; save it again with the tokenizers library")
    return copy


def _control(name: str) -> bool:
    """Whether a token flagged special is for control: a single character or a byte is text, whatever its flag."""
    return len(name) > 1 and not is_byte(name)


def _touches(pair: str | list[str], prefix: str, hidden: dict[str, str]) -> bool:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left in hidden or right in hidden or left + right.removeprefix(prefix) in hidden
