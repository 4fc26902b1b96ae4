"""A place that one text leaves goes to the next: texts are those of each prompt alone, and joined caches those of each text."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import engine
from mtp_dist.decoding.batch import Batch
from mtp_dist.decoding.cache import HiddenStates, KeyValues, Rows
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.drafters import build_drafter
from mtp_dist.decoding.engine import Generated, Growing, NewText, closed_up, continued, generate_batch, grow
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.tree import Tree
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import random_model
from tests.decoding.test_drafters import DRAFTERS, learner, settings
from tests.decoding.test_engine import check_counts
from tests.decoding.test_tree_caches import check_rebuilt

END = 8
PROMPTS = [[7, 8, 9], [1], [3, 4, 5, 3, 2, 7, 8], [20, 13, 1, 2], [5, 3], [2, 7, 9, 9, 4, 11, 1, 2, 3], [11]]
LIMITS = [17, 5, 20, 1, 12, 9, 16]
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "draft": 3} for name in DRAFTERS},
    "dynamic tree": {"name": "sequential", "tree": "dynamic", "tree_nodes": 7, "tree_width": 3},
    "static tree": {"name": "medusa", "tree": "static", "tree_nodes": 7, "tree_width": 3},
    "tree of a model": {"name": "model", "draft": 3, "tree": "dynamic", "tree_nodes": 7, "tree_width": 3},
    "tree of points": {"name": "notebook", "tree": "dynamic", "tree_nodes": 7, "tree_width": 3},
    "tree side by side": {"name": "parallel", "tree": "static", "tree_nodes": 7, "tree_width": 3},
}
"""Who drafts, and how."""


@cache
def exact(*key: Any) -> Chunk:
    """Knows a pattern: its drafts are partly right."""
    with torch.inference_mode(False), torch.enable_grad():
        return copy.deepcopy(learner(*key)).double()


@cache
def wild(name: str, seed: int = 7) -> Chunk:
    """Knows nothing: each draft depends on all that is in the caches."""
    return random_model(3, dtype=torch.float64, seed=seed, **DRAFTERS[name])


def texts(limits: list[int], *, seeded: bool = False) -> list[NewText]:
    chance = [torch.Generator().manual_seed(row) if seeded else None for row in range(len(PROMPTS))]
    return [NewText(*each) for each in zip(PROMPTS, limits, [None] * len(PROMPTS), chance, strict=True)]


def written(kind: str, new: list[NewText], rows: int, **others: Any) -> list[Generated]:
    config = settings(**KINDS[kind], **others)
    return generate_batch(exact(KINDS[kind]["name"]), new, config, rows=rows, end=END, draft_model=exact("model", 25))


@pytest.mark.parametrize("kind", KINDS)
def test_a_refilled_batch_writes_what_each_prompt_alone_gives(kind: str) -> None:
    """More prompts than places, of odd lengths, each with a limit of its own; the end of a document is among the drafts."""
    plain, chunk = DecodeConfig(mode="plain"), exact(KINDS[kind]["name"])
    alone = [generate_batch(chunk, [text], plain, end=END)[0] for text in texts(LIMITS)]
    assert {text.ending for text in alone} == {"length", "end_of_document"}
    accepted = rejected = 0
    for rows in (2, 3):
        found = written(kind, texts(LIMITS), rows)
        assert [(text.tokens, text.ending) for text in found] == [(text.tokens, text.ending) for text in alone]
        for text in found:
            check_counts(text.statistics, len(text.tokens))
            accepted += sum(text.statistics.accepted)
            rejected += sum(text.statistics.reached) - sum(text.statistics.accepted)
    assert accepted > 0
    assert rejected > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_text_does_not_depend_on_who_is_beside_it(kind: str) -> None:
    """Neither on their limits, nor on their drafts, nor on who leaves and joins."""
    # A tree needs a text of as many tokens as there are modules; until then, nobody beside such a text has one.
    short = [row for row, prompt in enumerate(PROMPTS) if len(prompt) < 2 and "tree" in kind]
    found = []
    for rows, limits in ((1, LIMITS), (3, LIMITS), (7, [30, *LIMITS[1:]])):
        new = [text for row, text in enumerate(texts(limits, seeded=True)) if row not in short]
        found.append([text.tokens for text in written(kind, new, rows, temperature=1.0, top_k=9)])
    found[2][0] = found[2][0][: len(found[0][0])]
    assert found[0] == found[1] == found[2]
    assert max(map(len, found[0])) > 5


def test_places_are_filled_as_texts_come() -> None:
    """Never more than the places; a text that comes late starts late; the loop ends when nothing grows and nothing waits."""
    asked, late = [], texts(LIMITS)
    come = {1: late[:2], 3: late[2:3], 4: late[3:]}  # by the number of the question

    def waiting(free: int) -> list[NewText]:
        asked.append(free)
        here = [text for number, batch in come.items() if number <= len(asked) for text in batch]
        for batch in come.values():
            batch[:] = [text for text in batch if text not in here[:free]]
        return here[:free]

    numbers: list[list[int]] = []
    grown: dict[int, Growing] = {}
    for growing in grow(exact("sequential"), waiting, settings("sequential"), rows=3, longest=30, end=END):
        numbers.append([text.number for text in growing])
        grown |= {text.number: text for text in growing}
    assert numbers[0] == [0, 1]
    assert max(map(len, numbers)) == 3 >= max(asked)
    assert asked[-1] == 3 and all(asked)
    assert [grown[number].text for number in range(7)] == texts_of(late, grown)
    alone = [generate_batch(exact("sequential"), [text], DecodeConfig(mode="plain"), end=END)[0].tokens for text in late]
    assert [grown[number].tokens for number in range(7)] == alone


def texts_of(late: list[NewText], grown: dict[int, Growing]) -> list[NewText]:
    """Here texts are asked for in their order."""
    return [late[number] for number in sorted(grown)]


def test_texts_come_in_order_each_as_soon_as_can_be() -> None:
    """The second ends before the first, and waits for it; the others are not even begun when these two are given."""
    begun: list[int] = []
    limits = [6, 1, 20, 20]
    new = (NewText(prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=False) if not begun.append(limit))  # type: ignore[func-returns-value]
    found = continued(exact("sequential"), new, DecodeConfig(mode="plain"), rows=2, longest=40)
    assert len(next(found).tokens) == 6
    assert begun == [6, 1, 20]
    assert len(next(found).tokens) == 1
    assert [len(text.tokens) for text in found] == [20, 20]


@pytest.mark.parametrize(("text", "longest"), [(NewText([], 3), 9), (NewText([1, 2], 8), 9)])
def test_a_text_that_cannot_be_is_refused(text: NewText, longest: int) -> None:
    with pytest.raises(ValueError, match="no token, or may become a text of more than 9"):
        list(continued(exact("sequential"), [text], DecodeConfig(mode="plain"), rows=1, longest=longest))


def test_every_second_is_charged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only work moves: a text's own prompt is its prefill, the rest is shared by those of a pass."""
    now = 0.0
    spent = dict.fromkeys(("start", "advance", "keep", "join"), 0.0)

    def costing(name: str, seconds: float) -> None:
        inner: Callable[..., Any] = getattr(Batch, name)

        def run(self: Batch, *arguments: Any) -> Any:
            nonlocal now
            now, spent[name] = now + seconds, spent[name] + seconds
            return inner(self, *arguments)

        monkeypatch.setattr(Batch, name, run)

    monkeypatch.setattr(engine.time, "perf_counter", lambda: now)
    for name, seconds in (("start", 1000.0), ("advance", 64.0), ("keep", 8.0), ("join", 1.0)):
        costing(name, seconds)
    found = written("sequential", texts(LIMITS), 3)
    assert all(spent.values())
    # The first three start together; the others come one by one, or two at once.
    shares = [text.statistics.prefill_seconds for text in found]
    assert shares[:3] == [1000 / 3] * 3
    assert set(shares[3:]) <= {1000, 500}
    assert sum(shares) == pytest.approx(spent["start"])
    # A batch that ends with its last text is not copied any more.
    assert sum(text.statistics.seconds for text in found) == pytest.approx(spent["advance"] + spent["keep"] + spent["join"])


def begun(kind: str, know: bool, prompts: list[list[int]]) -> Batch:
    name = KINDS[kind]["name"]
    model = DecodingModel(exact(name) if know else wild(name), 64, end=END)
    chance, other = Chance([None] * len(prompts)), exact("model", 25) if know else wild("model", 8)
    drafter = build_drafter(model, len(prompts), settings(**KINDS[kind]), Sampling(), chance, other=other)
    batch = Batch(model, prompts, Sampling(), drafter, chance)
    batch.start()
    return batch


scripts = st.lists(
    st.tuples(
        st.integers(0, 3),  # drafts of a round
        st.sets(st.integers(0, 3)),  # rows that leave after it
        st.lists(st.integers(1, 6), max_size=2),  # lengths of the prompts that join then, together
    ),
    min_size=2,
    max_size=5,
)


@torch.inference_mode()
def check_joins(kind: str, know: bool, script: list, prompts: list[int]) -> int:
    """After every round each row's caches of the trunk and its drafts are those of its text alone, just begun. Returns how many
    drafts were compared."""
    source = [token for _ in range(9) for token in PROMPTS[2]]
    batch, proposals, compared = begun(kind, know, [source[length : 2 * length] for length in prompts]), list[Any](), 0

    def watch(batch: Batch) -> None:
        assert batch.drafter is not None
        propose = batch.drafter.propose
        batch.drafter.propose = lambda *call: proposals.append(propose(*call)) or proposals[-1]  # type: ignore[method-assign, func-returns-value]

    watch(batch)
    for count, leave, join in script:
        before = [list(row) for row in batch.texts.rows]
        proposals.clear()
        batch.advance(count)
        check_rebuilt(batch.model, batch.texts, batch.caches)
        for found in proposals:
            for row, known in enumerate(before):
                fresh = begun(kind, know, [known[:-1]])
                assert fresh.drafter is not None
                assert fresh.texts.rows[0] == known
                alone = fresh.drafter.propose(fresh.texts, count)
                if isinstance(found, Proposal) and isinstance(alone, Proposal):
                    given = count if found.counts is None else found.counts[row]
                    assert found.tokens[row, :given].tolist() == alone.tokens[0].tolist() or not found.tokens.shape[1]
                    compared += given
                elif isinstance(found, Tree) and isinstance(alone, Tree):
                    assert found.tokens[row].tolist() == alone.tokens[0].tolist()
                    compared += found.nodes
        stay = [row for row in range(len(batch.texts)) if row not in leave]
        if stay and len(stay) < len(batch.texts):
            batch.keep(stay)
        if join:
            batch.join(begun(kind, know, [source[number + length : number + 2 * length] for number, length in enumerate(join)]))
    return compared


@examples(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(0, 5), unique=True, min_size=1), st.integers(0, 3)), max_size=6))
def test_rows_stay_whole_wherever_they_move(script: list[tuple[list[int], int]]) -> None:
    """In any order, in memory that there is and in new memory."""
    memory, expected = Rows(torch.arange(4.0).repeat(2, 1).T.contiguous()), [0.0, 1.0, 2.0, 3.0]
    for number, (rows, more) in enumerate(script):
        stay = [row for row in rows if row < len(expected)] or [0]
        memory.keep(stay)
        new = [10.0 * (number + 1) + place for place in range(more)]
        memory.join(Rows(torch.tensor(new).repeat(2, 1).T.contiguous()))
        expected = [expected[row] for row in stay] + new
        assert memory.rows.tolist() == [[value] * 2 for value in expected]


def test_a_gap_is_closed_by_the_last() -> None:
    """So one row moves for each that leaves."""
    assert closed_up([0, 1, 3, 4, 7]) == [0, 1, 7, 3, 4]
    assert closed_up([2, 3]) == [3, 2]
    assert closed_up([0, 1]) == [0, 1]
    assert closed_up([]) == []


RAGGED = [(3, set(), [2]), (2, {0}, []), (3, set(), [5, 1]), (1, {1, 2}, [4]), (3, set(), []), (3, set(), [])]


@examples(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(list(KINDS)), st.booleans(), scripts, st.lists(st.integers(1, 6), min_size=1, max_size=2))
@example("sequential", False, [(0, set(), [2]), *RAGGED], [3, 1])
def test_joined_caches_equal_those_from_scratch(kind: str, know: bool, script: list, prompts: list[int]) -> None:
    check_joins(kind, know, script, prompts)


@pytest.mark.parametrize("know", [True, False], ids=["taught", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_caches_of_every_kind(kind: str, know: bool) -> None:
    assert check_joins(kind, know, RAGGED, [4, 3]) > 20


@pytest.mark.parametrize("kind", ["sequential", "parallel", "model", "eagle3", "dynamic tree"])
def test_a_stale_join_would_be_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were another row's entries handed over, in the caches of the drafter alone, the check above would fail."""
    join, joined = KeyValues.join, []

    def mixed(self: KeyValues, other: KeyValues) -> None:
        joined.append(self)
        join(self, other)
        if all(self is not cache for cache in trunk):
            for memory in (*self.keys, *self.values):
                memory[-1] = memory[0]

    trunk: list[KeyValues] = []
    whole = Batch.join
    monkeypatch.setattr(Batch, "join", lambda self, other: (trunk.extend(self.caches), whole(self, other)))
    monkeypatch.setattr(KeyValues, "join", mixed)
    with pytest.raises(AssertionError):
        check_joins(kind, False, RAGGED, [4, 3])
    assert len(joined) > len(set(map(id, trunk)))


def test_stale_states_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    join = HiddenStates.join

    def mixed(self: HiddenStates, other: HiddenStates) -> None:
        other.memory.rows = other.states.roll(1, 1)
        join(self, other)

    monkeypatch.setattr(HiddenStates, "join", mixed)
    with pytest.raises(AssertionError):
        check_joins("sequential", False, RAGGED, [4, 3])
