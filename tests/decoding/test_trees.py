"""Trees of drafts, from whoever drafts: texts are the trunk's own, and what is drafted is what a chain would draft there."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_dist.config.schema import DecodeConfig, MTPConfig
from mtp_dist.decoding import tree_drafter, verification
from mtp_dist.decoding.draft_lengths import DraftLengths
from mtp_dist.decoding.drafters import draft_length, most_nodes
from mtp_dist.decoding.engine import NewText, generate_batch
from mtp_dist.decoding.request import validate_decoding, validate_heads
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.tree_drafter import race
from mtp_dist.decoding.tree_shape import default_shape, fault
from mtp_dist.errors import UserError
from tests.decoding.chi_square import excess
from tests.decoding.test_drafters import DRAFTERS, TEXTS, learner, settings, tiny
from tests.decoding.test_engine import check_counts, exact_texts

NAMES = [name for name in DRAFTERS if name != "ngram"]
TREES: dict[str, dict[str, Any]] = {
    "dynamic": {"tree": "dynamic", "tree_nodes": 9, "tree_width": 3},
    "pruned": {"tree": "dynamic", "tree_nodes": 3, "tree_width": 3},
    "static": {"tree": "static", "tree_nodes": 9, "tree_width": 3},
    "given": {"tree": "static", "tree_shape": [[0], [1], [0, 0], [1, 0], [1, 1], [1, 1, 0]]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_are_the_trunks(name: str, dtype: torch.dtype) -> None:
    """With ends of documents inside the text, alone and in batches whose rows accept different paths."""
    chunk, other = (copy.deepcopy(learner(*key)).to(dtype) for key in ((name,), ("model", 25)))
    plain = DecodeConfig(mode="plain", max_new_tokens=20, stop_at_eos=False)
    alone = [generate_batch(chunk, [prompt], plain, end=8)[0].tokens for prompt in TEXTS]
    for tree, rows in (("dynamic", [0, 1, 2, 3]), ("static", [0, 1, 2, 3]), ("given", [3]), ("dynamic", [2])):
        config = settings(name, max_new_tokens=20, stop_at_eos=False, **TREES[tree])
        results = generate_batch(chunk, [TEXTS[row] for row in rows], config, end=8, draft_model=other)
        assert [result.tokens for result in results] == [alone[row] for row in rows]
        for result in results:
            check_counts(result.statistics, 20)
            assert result.statistics.nodes > sum(result.statistics.drafted)
        assert sum(sum(result.statistics.accepted) for result in results) > 0


def deviation(name: str, tree: str, rows: int = 2000, **sampling: Any) -> float:
    """Of the first three tokens, sampled in one batch, from the exact distribution of the trunk's texts."""
    chunk, prompt = tiny(name), [0, 2, 0]
    # The third token would be the last, which no draft of depth 2 may be.
    config = settings(name, max_new_tokens=4, **{**TREES[tree], "tree_width": 2}, **sampling)
    exact = exact_texts(chunk, prompt, Sampling.of(config), 3, 3)
    texts = [NewText(prompt, 4, generator=torch.Generator().manual_seed(1000 + row)) for row in range(rows)]
    results = generate_batch(chunk, texts, config, draft_model=tiny("model", seed=12))
    counts = torch.zeros(3, 3, 3)
    for result in results:
        counts[tuple(result.tokens[:3])] += 1
    return excess(counts, exact * rows)


@pytest.mark.parametrize("tree", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_the_trunks(name: str, tree: str) -> None:
    assert deviation(name, tree, temperature=1.0) < 1


@pytest.mark.parametrize("name", ["sequential", "medusa"])
def test_samples_are_the_trunks_where_most_candidates_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the likelier of two drawn siblings the one that stays, the same test would find it."""
    assert deviation(name, "pruned", temperature=1.0) < 1

    def likelier_first(q: Tensor, count: int, source: Source) -> Tensor:
        found = race(q, count, source)
        return found.gather(-1, q.gather(-1, found).argsort(dim=-1, descending=True))

    monkeypatch.setattr(tree_drafter, "race", likelier_first)
    assert deviation(name, "pruned", temperature=1.0) > 1


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_samples_with_all_settings_are_the_trunks(tree: str) -> None:
    assert deviation("sequential", tree, temperature=0.8, top_k=2, top_p=0.95) < 1


@pytest.mark.parametrize(
    ("tree", "module", "function", "fault"),
    [
        ("dynamic", verification, "acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0])),
        ("dynamic", verification, "residual", lambda p, q: p),
        ("dynamic", tree_drafter, "race", lambda q, count, source: q.topk(count, dim=-1).indices),
        ("static", verification, "acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0])),
        ("static", verification, "residual", lambda p, q: p),
    ],
    ids=["accepts everything", "goes on with p", "chooses the likeliest", "accepts everything too", "goes on with p too"],
)
@pytest.mark.parametrize("name", ["sequential", "medusa"])
def test_the_same_test_finds_a_broken_verifier(
    name: str, tree: str, module: ModuleType, function: str, fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, fault)
    assert deviation(name, tree, temperature=1.0) > 1


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_typical_acceptance_is_lossy(tree: str) -> None:
    assert deviation("sequential", tree, temperature=1.0, verify="typical") > 1


@pytest.mark.parametrize("name", ["sequential", "medusa", "eagle"])
@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_a_text_ends_at_its_end_of_document_inside_a_tree(name: str, tree: str) -> None:
    inside = 0
    for end in (4, 5, 9, 11):
        plain = generate_batch(learner(name), TEXTS, DecodeConfig(mode="plain", max_new_tokens=24), end=end)
        found = generate_batch(learner(name), TEXTS, settings(name, max_new_tokens=24, **TREES[tree]), end=end)
        for expected, result in zip(plain, found, strict=True):
            assert (result.tokens, result.ending) == (expected.tokens, expected.ending)
            statistics = result.statistics
            check_counts(statistics, len(result.tokens))
            # Where the end was a draft, the trunk's own token after it is missing from the text.
            inside += sum(statistics.accepted) + statistics.forwards - statistics.loop_tokens
    assert inside > 0


def test_a_static_tree_of_first_choices_is_the_chain() -> None:
    """Beyond D, too: the same drafts, so the same forwards."""
    path = {"tree": "static", "tree_shape": [[0] * k for k in range(1, 6)]}
    for name in ("sequential", "eagle of few tokens", "eagle3", "notebook", "model"):
        counts = []
        for shape in ({"draft": 5}, path):
            config = settings(name, max_new_tokens=40, **shape)
            found = generate_batch(learner(name), TEXTS[2:3], config, draft_model=learner("model"))
            counts.append((found[0].tokens, found[0].statistics.forwards, found[0].statistics.accepted))
        assert counts[0] == counts[1]


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_more_nodes_need_fewer_forwards(tree: str) -> None:
    """The chain's drafts are among a tree's, so a forward gives at least as many tokens."""
    forwards = []
    for nodes in (3, 6, 12, 24):
        config = settings("medusa", max_new_tokens=60, stop_at_eos=False, tree=tree, tree_nodes=nodes)
        forwards.append(sum(result.statistics.forwards for result in generate_batch(learner("medusa"), TEXTS, config)))
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[-1] < forwards[0]


@pytest.mark.parametrize("tree", TREES)
def test_the_depth_of_a_tree_is_chosen(tree: str) -> None:
    """Whatever depths are tried, texts stay the trunk's, and all are tried, plain decoding among them."""
    config, lengths = settings("sequential", max_new_tokens=40, auto=True, **TREES[tree]), DraftLengths(3)
    plain = generate_batch(learner("sequential"), TEXTS, DecodeConfig(mode="plain", max_new_tokens=40))
    for _ in range(2):
        found = generate_batch(learner("sequential"), TEXTS, config, lengths=lengths)
        assert [result.tokens for result in found] == [result.tokens for result in plain]
    assert all(lengths.costs.values())
    assert sum(lengths.accepted) > 0


def test_sizes_of_trees() -> None:
    assert most_nodes(DecodeConfig(draft=3, tree="dynamic", tree_nodes=20, tree_width=2), 3) == 2 + 4 + 4
    assert most_nodes(DecodeConfig(draft=3, tree="dynamic", tree_nodes=7, tree_width=2), 3) == 7
    assert most_nodes(DecodeConfig(tree="static", tree_nodes=20, tree_width=2), 2) == 2 + 4
    assert most_nodes(DecodeConfig(draft=3), 2) == 3
    shape: dict[str, Any] = {"tree": "static", "tree_shape": [[0], [0, 0], [1]]}
    assert most_nodes(DecodeConfig(**shape), 5) == 3
    assert draft_length(DecodeConfig(**shape), 5) == 2
    assert most_nodes(DecodeConfig(mode="plain", **shape), 5) == 0


def test_default_shapes() -> None:
    assert default_shape(3, 4, 3) == [(0,), (1,), (0, 0), (0, 0, 0)]
    assert default_shape(2, 99, 2) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert default_shape(4, 3, 1) == [(0,), (0, 0), (0, 0, 0)]
    for nodes in range(1, 40):
        assert fault(default_shape(4, nodes, 3)) is None


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ([[0], [0]], "twice"),
        ([[0], []], "empty path"),
        ([[-1]], "-1 must be a whole number from 0"),
        ([[0], [1, 0]], r"lacks \[1\], the parent of \[1, 0\]"),
        ([[0], [0, 1]], r"lacks \[0, 0\], the choice before \[0, 1\]"),
    ],
)
def test_shapes_that_are_no_trees(shape: list[list[int]], wrong: str) -> None:
    with pytest.raises(UserError, match=rf"decode\.tree_shape.*{wrong}"):
        validate_decoding(DecodeConfig(tree="static", tree_shape=shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tree": "bush"}, "one of none, static or dynamic"),
        ({"tree": "dynamic", "tree_nodes": 0}, r"decode\.tree_nodes=0 must be a whole number from 1"),
        ({"tree": "dynamic", "tree_width": 0}, r"decode\.tree_width=0 must be a whole number from 1"),
        ({"tree": "dynamic", "drafter": "ngram"}, r"choose decode\.tree=none"),
        ({"tree": "dynamic", "tree_shape": [[0]]}, r"choose decode\.tree=static"),
        ({"tree": "static", "tree_shape": [[0]], "draft": 2}, "leave one out"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_do_not_go_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate_decoding(DecodeConfig(**wrong))


def test_a_shape_deeper_than_heads_side_by_side() -> None:
    config = DecodeConfig(tree="static", tree_shape=[[0], [0, 0], [0, 0, 0]])
    with pytest.raises(UserError, match=r"more than the model's mtp\.depth=2: .* choose paths of at most 2"):
        validate_heads(config, MTPConfig(kind="medusa", depth=2))
    validate_heads(config, MTPConfig(kind="eagle", depth=2))
