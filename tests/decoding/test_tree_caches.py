"""Trees change no cache: a node's states are those of a training pass over its path, and only the accepted path stays."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mtp_dist.decoding.batch import Batch
from mtp_dist.decoding.branching import ChainBranching
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.drafters import build_branching
from mtp_dist.decoding.model import TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Branches, Tree, filled
from mtp_dist.decoding.tree_drafter import TreeDrafter, dynamic, static
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.medusa import MedusaHeads
from mtp_dist.model.mtp.parallel import ParallelHeads
from tests.decoding.models import VOCABULARY, random_model
from tests.decoding.test_caches import END, EXACT, MODELS, OTHERS, Followed, check_prediction, rows, text, training_states, view
from tests.decoding.test_drafters import learner

SAMPLED = Sampling(0.8, 9, 0.95)
SHAPE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 0, 0), (0, 1, 0, 0)]


def random_tree(rows: int, nodes: int, seed: int) -> Tree:
    """Each row another one, with an end of a document now and then."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY // 4, (rows, nodes), generator=generator)
    parents = torch.stack([torch.randint(-1, node, (rows,), generator=generator) for node in range(nodes)], dim=1)
    depths = torch.ones_like(parents)
    for node in range(nodes):
        above = depths.gather(1, parents[:, node : node + 1].clamp(min=0))[:, 0]
        depths[:, node] = torch.where(parents[:, node] < 0, 1, above + 1)
    return Tree(tokens, parents, depths)


@settings(max_examples=15, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(rows, st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10**6)), min_size=1, max_size=4), st.booleans())
@torch.no_grad()
def test_the_trunk_over_trees_equals_a_training_pass_a_path(prompts: list[int], rounds: list, mask: bool) -> None:
    """Also in later rounds, whose texts go on from the path that was accepted; each row accepts another one."""
    chunk = random_model(1, dtype=torch.float64, document_mask=mask)
    model = view(chunk)
    texts = Texts([text(length, seed=length)[0].tolist() for length in prompts], 64, model.device)
    caches = model.caches(len(prompts))
    if max(texts.known) > 1:
        model.trunk(texts.tokens, caches, [known - 1 for known in texts.known])
    for number, (nodes, seed) in enumerate(rounds):
        tree = random_tree(len(prompts), nodes, seed)
        texts.branch(tree.tokens)
        known = list(texts.known)
        states = model.trunk(texts.tokens, caches, [length + nodes for length in known], Branches(tree, known)).after_norm
        for row in range(len(prompts)):
            for node in range(nodes):
                path = tree.paths(torch.full((len(prompts),), node))[row]
                spelt = [*texts.rows[row], *tree.tokens[row, path].tolist()]
                expected = training_states(chunk, torch.tensor([[*spelt, 0, 0]]))[0][0, len(spelt) - 1]
                torch.testing.assert_close(states[row, 1 + node], expected, **EXACT)
        ends = torch.tensor([(seed + number + row) % (nodes + 1) - 1 for row in range(len(prompts))])
        paths = tree.paths(ends)
        for cache in caches:
            cache.pick(known, torch.tensor(filled(paths), dtype=torch.int64))
        texts.extend([[*tree.tokens[row, path].tolist(), END + row] for row, path in enumerate(paths)])
        for cache in caches:
            cache.crop([length - 1 for length in texts.known])
        check_rebuilt(model, texts, caches)


def check_rebuilt(model: Any, texts: Texts, caches: list) -> None:
    """Each row's entries are those of a pass over its text alone."""
    for row, own in enumerate(texts.rows):
        fresh = model.caches(1)
        model.trunk(torch.tensor([own[:-1]]), fresh)
        for cache, other in zip(caches, fresh, strict=True):
            for kept, made in ((cache.keys[0], other.keys[0]), (cache.values[0], other.values[0])):
                torch.testing.assert_close(kept[row, :, : len(own) - 1], made[0, :, : len(own) - 1], **EXACT)


class FollowedTrees(Followed):
    """``Followed`` where drafts are trees."""

    def __init__(self, chunk: Chunk, prompts: list[list[int]], sampling: Sampling, most: int, kind: str) -> None:
        self.kind = kind
        super().__init__(chunk, prompts, sampling, most)
        self.own_chance = self.chance  # that of the drafter that follows

    def new_drafter(self, texts: Texts) -> TreeDrafter:
        branching = build_branching(self.model, len(texts), self.sampling, None, most=self.most)
        self.chance = Chance([])
        fixed = static(SHAPE, self.sampling, self.chance)
        grow = dynamic(9, 3, self.sampling, self.chance) if self.kind == "dynamic" else fixed
        return TreeDrafter(branching, grow)

    def trees(self, new: list[list[int]], count: int, seed: int) -> tuple[Tree | Proposal, list[Tree | Proposal]]:
        """Append new[b] to each text; the tree of the drafter that followed all along, and of new ones, each for one text."""
        shown = list(self.drafter.branching.positions)
        self.texts.extend(new)
        newest = [known - 1 for known in self.texts.known]
        if newest != shown:
            self.drafter.observe(self.texts, self.states(self.texts, shown, newest))
        self.own_chance.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(new))]
        ours, rebuilt = self.drafter.propose(self.texts, count), []
        for row, own in enumerate(self.texts.rows):
            alone = Texts([own[:1]], 64, self.model.device)
            fresh = self.new_drafter(alone)
            self.chance.generators = [torch.Generator().manual_seed(seed + row)]
            fresh.prefill(alone, self.states(alone, [0], [1]))
            alone.extend([own[1:]])
            if len(own) > 2:
                fresh.observe(alone, self.states(alone, [1], [len(own) - 1]))
            rebuilt.append(fresh.propose(alone, count))
        return ours, rebuilt


kinds = st.sampled_from(["dynamic", "static"])
scripts = st.lists(
    st.tuples(
        st.integers(1, 4),  # depth of the tree
        st.lists(st.integers(-1, 8), min_size=3, max_size=3),  # the node of the round before to which each row accepts
        st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=3),  # the trunk's own token after it
        st.booleans(),  # whether the last of several rows then leaves the batch
    ),
    min_size=2,
    max_size=4,
)


def check_trees(chunk: Chunk, prompts: list[int], script: list, kind: str, sampling: Sampling = SAMPLED) -> int:
    """After every round, every row's tree equals that from caches rebuilt for it alone, and where siblings are drawn, the
    distribution behind every inner node is the training pass's own prediction. Returns how many trees there were."""
    most = chunk.depth if isinstance(chunk.mtp, ParallelHeads | MedusaHeads) else 4
    followed = FollowedTrees(chunk, [text(length, seed=length)[0].tolist() for length in prompts], sampling, most, kind)
    trees: Tree | Proposal = Proposal(torch.empty(0), None)
    count = 0
    for number, (depth, ends, token, leaves) in enumerate(script):
        alive = len(followed.texts)
        paths: list[list[int]] = [[] for _ in range(alive)]
        if isinstance(trees, Tree):
            last = [min(end, trees.nodes - 1) for end in ends[:alive]]
            paths = [trees.tokens[row, path].tolist() for row, path in enumerate(trees.paths(torch.tensor(last)))]
        trees, rebuilt = followed.trees([[*paths[row], token[row]] for row in range(alive)], min(depth, most), 10 * number)
        if isinstance(trees, Tree):
            count += 1
            for row, other in enumerate(rebuilt):
                assert isinstance(other, Tree)
                for name in ("tokens", "parents", "depths"):
                    assert getattr(trees, name)[row].tolist() == getattr(other, name)[0].tolist()
                if trees.probabilities is not None and other.probabilities is not None:
                    torch.testing.assert_close(trees.probabilities[row], other.probabilities[0], **EXACT)
                check_predictions(chunk, followed.texts.rows[row], trees, row, sampling)
        if leaves and alive > 1:
            stay = list(range(1, alive))
            followed.texts.keep(stay)
            followed.drafter.keep(stay)
            trees = Tree(trees.tokens[1:], trees.parents[1:], trees.depths[1:]) if isinstance(trees, Tree) else trees
    return count


def check_predictions(chunk: Chunk, known: list[int], tree: Tree, row: int, sampling: Sampling) -> None:
    for leaf in set(range(tree.nodes)) - set(tree.parents[row].tolist()):
        path = tree.paths(torch.full((len(tree.tokens),), leaf))[row]
        q = None if tree.probabilities is None else tree.probabilities[row, [0, *(node + 1 for node in path[:-1])]].unsqueeze(0)
        if q is not None:
            check_prediction(chunk, torch.tensor([known]), Proposal(tree.tokens[row, path].unsqueeze(0), q), sampling)


@settings(max_examples=15, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(st.sampled_from(MODELS + OTHERS), rows, scripts, kinds, st.sampled_from([Sampling(), SAMPLED]))
@torch.no_grad()
def test_trees_equal_those_from_rebuilt_caches(
    chunk: Chunk, prompts: list[int], script: list, kind: str, sampling: Sampling
) -> None:
    check_trees(chunk, prompts, script, kind, sampling)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("number", range(len(OTHERS)))
@torch.no_grad()
def test_trees_of_every_kind_in_a_ragged_batch(number: int, kind: str) -> None:
    script = [(3, [-1] * 3, [1, END, 2], False), (4, [3, 0, 8], [4, END, 4], False), (3, [6, 1, -1], [5, 5, 5], True)]
    assert check_trees(OTHERS[number], [5, 3], [*script, (4, [2] * 3, [6] * 3, False)], kind) == 4


@torch.no_grad()
def check_engine(chunk: Chunk) -> int:
    """After every round the trunk's caches are those of a pass over each text, and the next trees those of texts just begun.
    Returns how many accepted paths had entries to be moved."""

    def begin(prompts: list[list[int]]) -> Batch:
        model, source = view(chunk), Chance([None] * len(prompts))
        branching = build_branching(model, len(prompts), Sampling(), source, most=3)
        batch = Batch(model, prompts, Sampling(), TreeDrafter(branching, dynamic(9, 3, Sampling(), source)), source)
        batch.start()
        return batch

    batch, moved, trees = begin([[7, 8, 9], [1, 2, 3, 4], [3, 4, 5, 3, 2, 7, 8]]), 0, []
    propose = batch.drafter.propose  # type: ignore[union-attr]
    batch.drafter.propose = lambda *call: trees.append(propose(*call)) or trees[-1]  # type: ignore[method-assign, union-attr]
    for _ in range(6):
        before = [list(row) for row in batch.texts.rows]
        rounds = batch.advance(3)
        check_rebuilt(batch.model, batch.texts, batch.caches)
        for row, known in enumerate(before):
            fresh = begin([known[:-1]])
            alone = fresh.drafter.propose(fresh.texts, 3)  # type: ignore[union-attr]
            assert fresh.texts.rows[0] == known
            assert trees[-1].tokens[row].tolist() == alone.tokens[0].tolist()
            accepted = rounds[row].tokens[:-1]
            moved += trees[-1].tokens[row, : len(accepted)].tolist() != accepted
    return moved


@pytest.mark.parametrize("name", ["sequential", "parallel", "medusa", "notebook", "eagle3"])
def test_the_engine_keeps_the_accepted_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a drafter handed states of other nodes, its drafts would show it, though texts would not."""
    chunk = copy.deepcopy(learner(name)).double()
    assert check_engine(chunk) > 0
    monkeypatch.setattr(TrunkPass, "picked", lambda self, places: self)
    with pytest.raises(AssertionError):
        check_engine(chunk)


@torch.no_grad()
def test_stale_entries_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a tree's entries kept in a module's cache, the check above would fail."""
    script = [(4, [-1] * 3, [1, 2, 3], False), (4, [0] * 3, [4, 5, 6], False)]
    check_trees(MODELS[8], [5, 3], script, "static")

    def keeping(self: ChainBranching, texts: Texts) -> None:
        for cache in self.caches:
            cache.crop([known - 1 for known in texts.known])

    monkeypatch.setattr(ChainBranching, "done", keeping)
    with pytest.raises((AssertionError, IndexError)):
        check_trees(MODELS[8], [5, 3], script, "static")
