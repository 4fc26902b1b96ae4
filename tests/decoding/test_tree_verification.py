"""Verifying a tree keeps the trunk's distribution, however its siblings were found; and a verifier that is wrong is found out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtp_dist.decoding import tree_verification, verification
from mtp_dist.decoding.sampling import draw
from mtp_dist.decoding.tree import Tree
from mtp_dist.decoding.tree_drafter import race
from mtp_dist.decoding.tree_verification import verify_drawn, verify_followed, verify_typical_tree
from tests.decoding.chi_square import excess
from tests.decoding.test_verification import CUT, PLAIN, ROWS, V, joint, tables

# Three siblings behind the root; two behind the first of them, one behind the second.
PARENTS, DEPTHS, WIDTH = [-1, -1, -1, 0, 0, 1], [1, 1, 1, 2, 2, 2], 3


def grown(first: Tensor, second: Tensor, q: Tensor | None = None) -> Tree:
    """first int64 [ROWS, 3], second int64 [ROWS, V, 2]: tokens of the first depth, and those behind each of them."""
    rows = torch.arange(ROWS)
    tokens = torch.cat((first, second[rows, first[:, 0]], second[rows, first[:, 1], :1]), dim=1)
    return Tree(tokens, torch.tensor(PARENTS).expand(ROWS, -1), torch.tensor(DEPTHS).expand(ROWS, -1), q)


def behind(p: list[Tensor], tokens: Tensor) -> Tensor:
    """[ROWS, 7, V]: the trunk's distributions behind the root and each node."""
    paths = [(tokens[:, 0], tokens[:, 3]), (tokens[:, 0], tokens[:, 4]), (tokens[:, 1], tokens[:, 5])]
    rows = [p[0].expand(ROWS, V), *(p[1][tokens[:, node]] for node in range(3)), *(p[2][path] for path in paths)]
    return torch.stack(rows, dim=1)


def at(values: Tensor, node: Tensor) -> Tensor:
    return values.gather(1, node.clamp(min=0).unsqueeze(1))[:, 0]


def deviation(settings: tuple[float, int, float], *, drawn: bool, seed: int = 3) -> float:
    """Of texts of three tokens from their exact distribution: one round with a tree; where it gave fewer, draws from p follow."""
    generator, p, q = torch.Generator().manual_seed(seed), tables(1, settings), tables(2, settings)
    if drawn:
        first, second = race(q[0].expand(ROWS, 1, V), WIDTH, generator)[:, 0], race(q[1].expand(ROWS, V, V), 2, generator)
        tree = grown(first, second)
        few = [q[0].expand(ROWS, V), *(q[1][tree.tokens[:, node]] for node in range(3)), *[torch.zeros(ROWS, V)] * 3]
        tree = Tree(tree.tokens, tree.parents, tree.depths, torch.stack(few, dim=1))
        verdict = verify_drawn(tree, behind(p, tree.tokens), generator)
    else:
        tree = grown(q[0].topk(WIDTH).indices.expand(ROWS, -1), q[1].topk(2).indices.expand(ROWS, -1, -1))
        verdict = verify_followed(tree, draw(behind(p, tree.tokens), generator))
    above = torch.where(verdict.node < 0, -1, at(tree.parents, verdict.node))
    depth = (verdict.node >= 0).long() + (above >= 0)
    path = torch.stack((at(tree.tokens, above), at(tree.tokens, verdict.node), verdict.token), dim=1)
    text = path.gather(1, (torch.arange(3) + 2 - depth.unsqueeze(1)).clamp(max=2))
    for position in (1, 2):
        plain = draw(p[1][text[:, 0]] if position == 1 else p[2][text[:, 0], text[:, 1]], generator)
        text[:, position] = torch.where(depth < position, plain, text[:, position])
    counts = torch.bincount(text @ torch.tensor([V * V, V, 1]), minlength=V**3)
    return excess(counts, joint(p).flatten() * ROWS)


@pytest.mark.parametrize("settings", [PLAIN, CUT, (1.5, 2, 1.0)], ids=["temperature_1", "all_three", "top_k"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "likeliest"])
def test_texts_are_distributed_as_the_trunk_alone_would_write_them(settings: tuple[float, int, float], drawn: bool) -> None:
    """top_k=2 leaves fewer possible tokens than there are siblings."""
    assert deviation(settings, drawn=drawn) < 1


FAULTS: dict[str, tuple[object, str, Callable[..., Tensor]]] = {
    "accepts everything": (verification, "acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0])),
    "accepts with p": (verification, "acceptance", lambda drafts, p, q: p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)),
    "goes on with p": (verification, "residual", lambda p, q: p),
    "does not scale": (tree_verification, "_scaled", lambda weights: weights),
}


def test_it_finds_one_that_follows_what_was_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_verification, "_reached", lambda tree, right: torch.ones_like(right))
    assert deviation(PLAIN, drawn=False) > 1


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_test_finds_a_broken_verifier(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, function = FAULTS[fault]
    monkeypatch.setattr(module, name, function)
    assert deviation(PLAIN, drawn=True) > 1


def test_siblings_are_drawn_without_replacement() -> None:
    q = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    pairs = race(q.expand(ROWS, V), 2, torch.Generator().manual_seed(0))
    counts = torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).view(V, V)
    expected = torch.stack([q[first] * q.index_fill(0, torch.tensor(first), 0) / (1 - q[first]) for first in range(V)])
    assert excess(counts, expected * ROWS) < 1
    # The impossible one comes last.
    assert (race(q.expand(10, V), V, None)[:, -1] == 3).all()


def test_a_tree_from_the_trunks_own_distribution_is_accepted_at_once() -> None:
    p = torch.rand(500, V, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    tokens = race(p, 2, torch.Generator().manual_seed(1))
    behind_all = torch.stack((p, p, p), dim=1)
    verdict = verify_drawn(Tree(tokens, torch.full_like(tokens, -1), torch.ones_like(tokens), behind_all), behind_all, None)
    assert verdict.node.tolist() == [0] * 500


def test_the_chosen_path_is_followed() -> None:
    #          root: 7, 8     7: 1, 2     8: 1      (7, 2): 5
    tokens, parents, depths = [7, 8, 1, 2, 1, 5], [-1, -1, 0, 0, 1, 3], [1, 1, 2, 2, 2, 3]
    tree = Tree(*(torch.tensor([row] * 5) for row in (tokens, parents, depths)))
    chosen = torch.tensor([
        # behind root, 7, 8, (7, 1), (7, 2), (8, 1), (7, 2, 5)
        [7, 2, 1, 9, 5, 9, 4],
        [7, 2, 1, 9, 6, 9, 4],
        [8, 2, 1, 9, 5, 3, 4],
        [8, 2, 2, 9, 5, 3, 4],
        [6, 2, 1, 9, 5, 3, 4],
    ])  # fmt: skip
    verdict = verify_followed(tree, chosen)
    assert verdict.node.tolist() == [5, 3, 4, 1, -1]
    assert verdict.token.tolist() == [4, 6, 3, 2, 6]
    assert tree.paths(verdict.node) == [[0, 3, 5], [0, 3], [1, 4], [1], []]


def test_typical_acceptance_takes_the_longest_path() -> None:
    tree = Tree(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1, -1, 1, 2]]), torch.tensor([[1, 1, 2, 3]]))
    even = [0.25] * 4
    p = torch.tensor([[[0.6, 0.4, 0.0, 0.0], even, [0.0, 0.0, 1.0, 0.0], even, even]], dtype=torch.float64)
    # Both first nodes are likely enough; behind the second, 2 is certain and then 3 one of four: 0.3 / 4 is less.
    assert verify_typical_tree(tree, p, 0.3, 0.3, None).node.tolist() == [3]
    # 1.2 / 4 is more.
    assert verify_typical_tree(tree, p, 0.3, 1.2, None).node.tolist() == [2]
    assert verify_typical_tree(tree, p, 0.5, 1.2, None).node.tolist() == [0]
