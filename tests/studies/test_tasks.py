"""Promise: the made-up tasks are what they say, held against solutions of their own; intervals and matching count right."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mtp_dist.config.schema import InductionTask, PathStarTask, PolynomialTask, Study
from mtp_dist.config.study import settled
from mtp_dist.errors import UserError
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.targets import IGNORE, targets
from mtp_dist.studies import choice_points, induction, path_star, polynomials
from mtp_dist.studies.answers import exact, question_and_answer, right
from mtp_dist.studies.choice_points import Terms
from mtp_dist.studies.experiment import Outcome
from mtp_dist.studies.intervals import NORMAL975, T975, difference, interval
from mtp_dist.studies.matching import matched, parameters
from mtp_dist.studies.runs import Run, outcome_of
from tests.model.small import small_model


@pytest.mark.parametrize(
    ("depth", "fed", "hard", "terms"), [(0, False, 1, 7), (2, False, 6, 21), (2, True, 3, 21), (3, False, 10, 28)]
)
def test_hard_terms_are_those_of_the_source_documents(depth: int, fed: bool, hard: int, terms: int) -> None:
    assert Terms(7, depth, 3, fed).hard_share() == pytest.approx(hard / terms)
    if not fed:
        heads = depth + 1
        assert hard / terms == heads * (heads + 1) / 2 / (heads * 7)


@pytest.mark.parametrize("fed", [False, True])
def test_hard_terms_are_those_that_cross_the_choice(fed: bool) -> None:
    """Listed by hand: position i predicts token i+k+1; it is hard if the choice lies between, and what is fed does not tell."""
    terms, tokens = Terms(7, 2, 3, fed), torch.arange(10).view(1, -1)
    for k in range(3):
        batch = terms.marked(tokens, *terms.hard_span(k))
        counted = (targets(batch.tokens, batch.documents, 2)[0, :, k] != IGNORE).nonzero().flatten().tolist()
        told = k if fed else 0  # tokens behind i that the head sees
        assert counted == [i for i in range(7) if i + told <= 3 < i + k + 1]


def test_choice_rows_leave_one_choice() -> None:
    config = Study(experiment="choice_points")
    config.train.sequence_length, config.mtp.depth = 7, 2
    config = settled(config)
    tokens = choice_points.rows(config, 400, torch.Generator().manual_seed(1)).tokens
    assert tokens.max() < config.model.vocab_size
    follows: list[dict[int, set[int]]] = [{} for _ in range(9)]
    for row in tokens.tolist():
        for place in range(9):
            follows[place].setdefault(row[place], set()).add(row[place + 1])
    assert [max(len(next_ones) for next_ones in place.values()) for place in follows] == [1, 1, 1, 8, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("reverse", [False, True])
def test_path_star_answers_are_what_the_solver_finds(reverse: bool) -> None:
    task = PathStarTask(degree=3, length=4, nodes=15, reverse=reverse)
    batch = path_star.graphs(task, 50, 40, torch.Generator().manual_seed(3))
    question = 2 * 3 * 4 + 3
    for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
        answer = tokens[question : question + 4]
        assert answer == path_star.solved(task, tokens[:question])
        assert len(set(answer)) == 4
        assert [place for place, number in enumerate(documents) if number == 0] == list(range(question - 1, question + 4))
        # The star: the common node starts every arm, nobody else starts two edges.
        starts = tokens[: 2 * 12 : 2]
        assert starts.count(tokens[question - 3]) == 3
        assert sorted(starts.count(node) for node in set(starts)) == [1] * (len(set(starts)) - 1) + [3]
    arms = {tuple(row[:2]) for row in batch.tokens.tolist()}
    assert len(arms) > 20  # edges are in random order


def test_induction_marks_what_was_seen() -> None:
    task = InductionTask(names=10, words=7, people=3, mentions=7)
    batch, known = induction.rows(task, 100, 31, torch.Generator().manual_seed(5))
    for tokens, marks in zip(batch.tokens.tolist(), known.tolist(), strict=True):
        seen: dict[int, int] = {}
        place, mentions = 0, 0
        while place < 31:
            if tokens[place] < task.words:
                assert not marks[place]
                place += 1
                continue
            first, second = tokens[place : place + 2]
            assert second >= task.words
            assert marks[place + 1] == (first in seen)
            assert seen.setdefault(first, second) == second
            place, mentions = place + 2, mentions + 1
        assert mentions == 7 and len(seen) <= 3


def test_polynomials_equal_numpy() -> None:
    p, draw = 7, random.Random(2)
    for _ in range(200):
        a, b = (tuple(draw.randrange(p) for _ in range(3)) for _ in range(2))
        cut = lambda values: tuple(int(x) % p for x in [*values, 0, 0, 0][:3])  # noqa: E731
        pa, pb = np.polynomial.Polynomial(a), np.polynomial.Polynomial(b)
        assert polynomials.added(a, b, p) == cut((pa + pb).coef.round())
        assert polynomials.multiplied(a, b, p) == cut((pa * pb).coef.round())
        assert polynomials.composed(a, b, p) == cut(pa(pb).coef.round())
        assert polynomials.added(a, polynomials.negated(a, p), p) == (0, 0, 0)


def test_expressions_read_back_give_their_value() -> None:
    task, draw = PolynomialTask(coefficients=2, beyond=4), random.Random(4)

    def value(tokens: list[int]) -> tuple[int, ...]:
        head = tokens.pop(0)
        if head < 7:
            return head, tokens.pop(0)
        if head == 7:
            return polynomials.negated(value(tokens), 7)
        one, other = value(tokens), value(tokens)
        return [polynomials.added, polynomials.multiplied, polynomials.composed][head - 8](one, other, 7)

    for operations in range(5):
        for _ in range(50):
            tokens, wanted = polynomials.expression(task, operations, draw)
            assert sum(7 <= token <= 10 for token in tokens) == operations
            rest = list(tokens)
            assert value(rest) == wanted and not rest


def test_rows_have_room_for_the_longest_expression() -> None:
    config = Study(experiment="polynomials")
    config = settled(config)
    batch = polynomials.rows(config.polynomials, 300, config.train.sequence_length + 1, random.Random(1), 3)
    assert (batch.documents[:, -1] == 0).any()  # some row is full: all operations take two arguments


def test_right_answers_are_those_of_greedy_decoding() -> None:
    """Against writing token by token."""
    model = small_model(0, document_mask=False)
    model.attention = "causal"
    draw = random.Random(1)
    questions = [[draw.randrange(13) for _ in range(draw.randint(2, 4))] for _ in range(40)]
    answers = []
    for row, question in enumerate(questions):
        written = list(question)
        for _ in range(3):
            written.append(_greedy(model, written))
        answers.append([(token + (row % 4 == 0)) % 13 for token in written[-3:]])
    batch = question_and_answer(questions, answers, 8)
    assert exact(model, batch).tolist() == [row % 4 != 0 for row in range(40)]
    assert right(model, batch)[1].sum() == 3


def _greedy(model: Chunk, tokens: list[int]) -> int:
    """The trunk's choice by its loss: the target that costs least."""
    losses = []
    for token in range(13):
        row = torch.tensor([[*tokens, token]])
        documents = torch.full_like(row, -1).int()
        documents[:, -2:] = 0
        losses.append(model(tokens=row, documents=documents, scale=torch.ones(1, 1))[0].item())
    return losses.index(min(losses))


def test_intervals_are_those_of_student() -> None:
    middle = interval([1.0, 2.0, 3.0])
    assert middle.mean == 2.0
    assert middle.half == pytest.approx(4.303 / math.sqrt(3))
    assert not interval([-1.0, 0.0, 2.0]).resolved and interval([1.0, 1.1, 0.9]).resolved
    assert interval([5.0]).half is None
    assert difference([3.0, 5.0], [1.0, 3.0]).half == 0.0  # paired: what seeds share falls out


def test_quantiles_are_those_of_student() -> None:
    """By adding up the density."""
    for freedom, quantile in enumerate(T975, start=1):
        x = np.linspace(0, quantile, 200_001)
        factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        assert np.trapezoid(factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x) == pytest.approx(0.475, abs=2e-4)
    assert T975[-1] > NORMAL975


@pytest.mark.parametrize("kind", ["none", "sequential", "parallel", "medusa"])
def test_matched_variants_have_the_wanted_size(kind: str) -> None:
    config = Study(parameters=900_000)
    config.model.vocab_size, config.model.hidden, config.model.head_dim = 500, 96, 12
    config.mtp.kind, config.mtp.depth = kind, 3 if kind != "none" else 0
    full = matched(config)
    assert abs(parameters(full) - 900_000) < 0.02 * 900_000
    with torch.device("meta"):
        model = Chunk(full.model, full.mtp, range(full.model.layers))
    assert sum(p.numel() for p in model.parameters()) == parameters(full)
    config.parameters = 1000
    with pytest.raises(UserError, match="parameters=1000"):
        matched(config)


def test_a_finished_run_is_not_measured_again_unless_its_settings_change(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure(config: Study) -> Outcome:
        asked.append(config.seed)
        return Outcome({"value": config.optim.lr}, {"loss": [[0.0, 1.0]]})

    config = Study(seed=4)
    run = Run("one", config, tmp_path / "one.json")
    first, new = outcome_of(run, measure)
    again, newer = outcome_of(run, measure)
    assert (new, newer, asked) == (True, False, [4]) and again == first
    config.optim.lr = 0.5
    assert outcome_of(run, measure)[0].numbers == {"value": 0.5} and asked == [4, 4]
    run.file.write_text('{"settings": "torn')
    assert outcome_of(run, measure)[1]
