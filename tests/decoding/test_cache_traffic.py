"""Promise: the bytes that decoding is said to move through its caches are those that caches are handed and attention is given,
rejected drafts included: by hand on a small case, and recounted from the tensors themselves for every kind of drafter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import engine
from mtp_dist.decoding.batch import Batch
from mtp_dist.decoding.cache import Extension, KeyValues
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.engine import NewText, generate_batch
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.statistics import Statistics, total
from mtp_dist.decoding.text import Texts
from tests.decoding.models import VOCABULARY, random_model
from tests.decoding.test_drafters import DRAFTERS, learner

TEXTS = [[7, 8, 9], [1], [3, 4, 5, 3, 2, 7, 8], [20, 13, 1, 2]]
# Keys and values of one position in one layer: 2 heads of width 8 in float32.
ENTRY = 2 * 2 * 8 * 4
LAYERS = 2


class Scripted:
    """Two drafts a round: those of a text that is known, or others. It has no cache."""

    def __init__(self, continuation: list[int], right: bool) -> None:
        self.continuation, self.right = continuation, right

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.prompt = texts.known[0]

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        pass

    def propose(self, texts: Texts, count: int) -> Proposal:
        begin = texts.known[0] - self.prompt
        found = [token if self.right else (token + 1) % VOCABULARY for token in self.continuation[begin : begin + count]]
        for place, token in enumerate(found):
            texts.draft(place, torch.tensor([token]))
        return Proposal(torch.tensor([found]), None)


def scripted(monkeypatch: pytest.MonkeyPatch, right: bool) -> Statistics:
    """Seven tokens behind a prompt of three."""
    chunk, plain = random_model(2), DecodeConfig(mode="plain", max_new_tokens=12, temperature=0)
    (known,) = generate_batch(chunk, [[1, 2, 3]], plain)
    monkeypatch.setattr(engine, "build_drafter", lambda *_, **__: Scripted(known.tokens, right))
    drafted = DecodeConfig(mode="speculative", draft=2, max_new_tokens=7, temperature=0)
    (found,) = generate_batch(chunk, [[1, 2, 3]], drafted)
    assert found.tokens == known.tokens[:7]
    return found.statistics


def test_plain_decoding_by_hand() -> None:
    """Six passes behind the prompt's: each writes its token, and reads all up to it."""
    config = DecodeConfig(mode="plain", max_new_tokens=7, temperature=0)
    (found,) = generate_batch(random_model(2), [[1, 2, 3]], config)
    statistics = found.statistics
    assert statistics.trunk_cache_written == 6 * LAYERS * ENTRY
    assert statistics.trunk_cache_read == (4 + 5 + 6 + 7 + 8 + 9) * LAYERS * ENTRY
    assert statistics.drafter_cache_written == statistics.drafter_cache_read == 0
    assert statistics.cache_bytes_per_token == {
        "trunk_written": LAYERS * ENTRY, "trunk_read": 6.5 * LAYERS * ENTRY, "drafter_written": 0, "drafter_read": 0,
        "all": 7.5 * LAYERS * ENTRY,
    }  # fmt: skip


def test_accepted_drafts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of three tokens each: as much is written, a third of the passes read."""
    statistics = scripted(monkeypatch, right=True)
    assert statistics.accepted == [2, 2]
    assert statistics.trunk_cache_written == 6 * LAYERS * ENTRY
    assert statistics.trunk_cache_read == (6 + 9) * LAYERS * ENTRY


def test_rejected_drafts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token a pass. All passes but the last two have room for two drafts: one, then none."""
    statistics = scripted(monkeypatch, right=False)
    assert statistics.accepted == [0, 0]
    widths = [3, 3, 3, 3, 2, 1]
    assert statistics.trunk_cache_written == sum(widths) * LAYERS * ENTRY
    assert statistics.trunk_cache_read == sum(3 + i + width for i, width in enumerate(widths)) * LAYERS * ENTRY


class Recount:
    """What caches were handed and attention was given in rounds behind prompts, of all rows: bytes by owner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counting = False
        self.of_trunk: set[int] = set()
        self.written, self.read = {True: 0, False: 0}, {True: 0, False: 0}
        extend, pick, advance, init = Extension.extend, KeyValues.pick, Batch.advance, Batch.__init__

        def counted_extend(extension: Extension, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            seen = extend(extension, key, value)
            self.add(extension.cache, key.nbytes + value.nbytes, sum(part.numel() * part.itemsize for part in seen))
            return seen

        def counted_pick(cache: KeyValues, first: list[int], slots: Tensor) -> None:
            moved = sum(part[:, :, : slots.shape[1]].numel() * part.itemsize for part in (*cache.keys, *cache.values))
            self.add(cache, moved, moved)
            pick(cache, first, slots)

        def counted_advance(batch: Batch, drafts: int) -> Any:
            self.counting = True
            self.of_trunk |= {id(cache) for cache in batch.caches}
            try:
                return advance(batch, drafts)
            finally:
                self.counting = False

        monkeypatch.setattr(Extension, "extend", counted_extend)
        monkeypatch.setattr(KeyValues, "pick", counted_pick)
        monkeypatch.setattr(Batch, "advance", counted_advance)
        self.kept: list[Batch] = []  # else another cache may get the identity of one that is gone
        monkeypatch.setattr(Batch, "__init__", lambda batch, *given: (self.kept.append(batch), init(batch, *given))[1])

    def add(self, cache: KeyValues, written: int, read: int) -> None:
        if self.counting:
            self.written[id(cache) in self.of_trunk] += written
            self.read[id(cache) in self.of_trunk] += read

    def check(self, statistics: Statistics) -> None:
        assert statistics.trunk_cache_written == self.written[True] > 0
        assert statistics.trunk_cache_read == self.read[True] > 0
        assert statistics.drafter_cache_written == self.written[False]
        assert statistics.drafter_cache_read == self.read[False]


@pytest.fixture
def recount(monkeypatch: pytest.MonkeyPatch) -> Recount:
    return Recount(monkeypatch)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "chain": {"mode": "speculative", "draft": 4},
    "tree": {"mode": "speculative", "tree": "static"},
    "dynamic tree": {"mode": "speculative", "tree": "dynamic", "tree_nodes": 7, "tree_width": 3},
}
WITHOUT_CACHES = ("medusa", "notebook", "ngram")


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in DRAFTERS for case in CASES if not (name == "ngram" and "tree" in case)]
)
def test_a_recount_finds_the_same_bytes(name: str, case: str, recount: Recount) -> None:
    """Four texts, three at a time: ragged rows, one that leaves and one that joins."""
    drafter = name if name in ("ngram", "model") else "heads"
    settings = CASES[case] | ({"draft": 2} if name == "parallel" and case == "chain" else {})
    config = DecodeConfig(drafter=drafter, max_new_tokens=14, temperature=0, **settings)
    other = learner("sequential", 30) if drafter == "model" else None
    texts = generate_batch(learner(name), [NewText(text, 14) for text in TEXTS], config, rows=3, draft_model=other)
    statistics = total(text.statistics for text in texts)
    recount.check(statistics)
    assert (statistics.drafter_cache_written > 0) == (case != "plain" and name not in WITHOUT_CACHES)


def test_what_prompts_move_is_not_counted() -> None:
    """A text of one token has no loop."""
    (found,) = generate_batch(random_model(2), [[1, 2, 3]], DecodeConfig(mode="speculative", max_new_tokens=1, temperature=0))
    assert found.statistics.trunk_cache_read == found.statistics.drafter_cache_read == 0
    assert set(found.statistics.cache_bytes_per_token.values()) == {None}


def test_each_row_of_a_pass_has_what_the_longest_needs() -> None:
    model = DecodingModel(random_model(2), 20)
    cache = model.caches(3)[0]
    cache.at(model.span([0, 0, 0], [4, 2, 1]))
    trunk, drafter = model.moved()
    assert (trunk.written, trunk.read) == (4 * ENTRY, 4 * ENTRY)
    assert (drafter.written, drafter.read) == (0, 0)
    assert model.moved()[0].read == 0, "taken twice"
