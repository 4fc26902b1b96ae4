"""Speculative decoding writes what plain decoding writes, only in fewer forwards; and its counts are true."""

import copy
import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import verification
from mtp_dist.decoding.batch import Batch
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.drafters import draft_length
from mtp_dist.decoding.engine import Generated, Growing, NewText, generate, generate_batch
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.text import Texts
from mtp_dist.model.chunk import Chunk
from tests.decoding.chi_square import excess
from tests.decoding.models import VOCABULARY, random_model, taught

PATTERN = [1, 2, 3, 4, 5, 3, 2, 7, 8, 9, 4, 11]
VARIANTS = [
    {},
    {"concat": "hidden_first", "recycle": "pre_norm"},
    {"tie": False, "h0": "pre_norm"},
    {"repeat": True},
    {"document_mask": False, "h0": "pre_norm", "recycle": "pre_norm"},
]
DTYPES = [torch.float32, torch.float64]


@cache
def half_taught(depth: int = 2) -> Chunk:
    """Knows the pattern, its modules not perfectly: recycled drafts are partly right."""
    return taught(random_model(depth, std=0.02), PATTERN, steps=60)


def decode(chunk: Chunk, prompt: list[int], mode: str, *, end: int | None = None, seed: int = 0, **settings: object) -> Generated:
    config = DecodeConfig(mode=mode, **{"max_new_tokens": 24, **settings})  # type: ignore[arg-type]
    return generate(chunk, prompt, config, end=end, generator=torch.Generator().manual_seed(seed))


def check_counts(statistics: Statistics, tokens: int) -> None:
    assert statistics.tokens == tokens
    assert statistics.loop_tokens == tokens - 1
    assert sum(statistics.histogram) == statistics.forwards
    assert sum(n * times for n, times in enumerate(statistics.histogram)) == tokens - 1
    for drafted, reached, accepted in zip(statistics.drafted, statistics.reached, statistics.accepted, strict=True):
        assert accepted <= reached <= drafted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_texts_of_random_models_are_identical(depth: int, variant: dict, dtype: torch.dtype) -> None:
    """Nearly every draft is rejected: roll-back after roll-back, with ends of documents inside the text."""
    chunk = random_model(depth, dtype=dtype, seed=depth, **variant)
    for prompt, gamma in zip([[5], [1, 2, 3], list(range(7)), [4, 0, 9, 2, 2], [6, 6]], range(1, 6), strict=True):
        plain = decode(chunk, prompt, "plain", end=11, stop_at_eos=False)
        speculative = decode(chunk, prompt, "speculative", draft=gamma, end=11, stop_at_eos=False)
        assert speculative.tokens == plain.tokens
        check_counts(speculative.statistics, 24)


@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_texts_of_a_taught_model_are_identical(depth: int, gamma: int) -> None:
    """Drafts are accepted, so states and caches made from drafts live on."""
    chunk = half_taught(depth)
    for prompt in ([1], [7, 8, 9], [3, 4, 5, 3, 2], [0, 20, 13, 1, 2, 3, 2]):
        plain = decode(chunk, prompt, "plain")
        speculative = decode(chunk, prompt, "speculative", draft=gamma)
        assert speculative.tokens == plain.tokens
        check_counts(speculative.statistics, 24)
        assert speculative.statistics.accepted[0] > 0
        assert speculative.statistics.forwards < plain.statistics.forwards == 23


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Full acceptance everywhere would leave roll-back untested, none everywhere the rest."""
    statistics = decode(half_taught(), [1, 2, 3], "speculative", draft=5, max_new_tokens=40).statistics
    assert statistics.acceptance[0] == 1
    assert 0 < sum(statistics.accepted[2:]) < sum(statistics.reached[2:])
    assert statistics.conditional_acceptance[3] > statistics.acceptance[3]


def test_a_draft_length_beyond_the_depth_recycles_the_last_module() -> None:
    statistics = decode(half_taught(1), [1, 2, 3], "speculative", draft=3, max_new_tokens=40).statistics
    assert len(statistics.drafted) == 3
    assert statistics.accepted[1] > 0


def test_the_draft_length_is_the_depth_unless_set() -> None:
    assert draft_length(DecodeConfig(mode="speculative"), 3) == 3
    assert draft_length(DecodeConfig(mode="speculative", draft=1), 3) == 1
    assert draft_length(DecodeConfig(mode="plain", draft=2), 3) == 0


def test_a_text_ends_at_its_end_of_document_wherever_in_a_draft_it_stands() -> None:
    chunk, inside, after = half_taught(3), 0, 0
    for end in sorted(set(PATTERN)):
        for gamma in (2, 3, 4):
            plain = decode(chunk, [1, 2, 3], "plain", end=end)
            speculative = decode(chunk, [1, 2, 3], "speculative", draft=gamma, end=end)
            assert speculative.tokens == plain.tokens
            assert speculative.tokens.index(end) == len(speculative.tokens) - 1
            assert speculative.ended
            assert plain.ended
            statistics = speculative.statistics
            check_counts(statistics, len(plain.tokens))
            # Where the end was a draft, the trunk's own token after the drafts is missing from the text.
            dropped = sum(statistics.accepted) + statistics.forwards - statistics.loop_tokens
            inside, after = inside + (dropped == 1), after + (dropped == 0)
    assert inside > 0
    assert after > 0


def test_a_text_goes_on_after_its_end_of_document_when_asked() -> None:
    result = decode(half_taught(), [1, 2, 3], "speculative", end=5, stop_at_eos=False)
    assert len(result.tokens) == 24
    assert not result.ended


def test_length_is_exact_whatever_the_draft_length() -> None:
    for limit, gamma in itertools.product((1, 2, 3, 4, 7), (1, 3, 5)):
        result = decode(half_taught(), [1, 2], "speculative", draft=gamma, max_new_tokens=limit)
        assert len(result.tokens) == limit
        assert result.tokens == decode(half_taught(), [1, 2], "plain", max_new_tokens=limit).tokens


def test_rows_that_pad_the_vocabulary_are_never_drawn() -> None:
    chunk = random_model(2, seed=4)
    wide = generate(chunk, [1], DecodeConfig(max_new_tokens=24))
    narrow = generate(chunk, [1], DecodeConfig(max_new_tokens=24), vocabulary=8)
    assert max(wide.tokens) >= 8 > max(narrow.tokens)


class Oracle:
    """Knows the texts; in round r, draft wrong[r][b] of text b is wrong, and counts[r][b] are drafted of it at most."""

    def __init__(self, texts: list[list[int]], wrong: list[list[int | None]], counts: list[list[int]] | None = None) -> None:
        self.texts, self.wrong, self.counts = texts, iter(wrong), iter(counts or [])
        self.shown = [0] * len(texts)

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.shown = list(texts.known)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        assert [known - 1 - shown <= trunk.after_norm.shape[1] for known, shown in zip(texts.known, self.shown, strict=True)]
        self.shown = [known - 1 for known in texts.known]

    def propose(self, texts: Texts, count: int) -> Proposal:
        places, counts = next(self.wrong, [None] * len(texts)), next(self.counts, None)
        for draft in range(count):
            right = torch.tensor([text[known + draft] for text, known in zip(self.texts, texts.known, strict=True)])
            texts.draft(draft, (right + torch.tensor([int(place == draft) for place in places])) % VOCABULARY)
        return Proposal(texts.drafts(count), None, counts)

    def keep(self, rows: list[int]) -> None:
        self.texts = [self.texts[row] for row in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_drafter_leaves_the_texts_alone_and_the_trunk_keeps_what_is_right(dtype: torch.dtype) -> None:
    chunk, prompts = random_model(1, dtype=dtype, seed=9), [[3, 1, 4], [5], [2, 7, 1, 8, 2]]
    texts = [prompt + decode(chunk, prompt, "plain", max_new_tokens=60).tokens for prompt in prompts]
    wrong = [[0, 1, 2], [1, None, 0], [None, None, 3], [2, 0, None], [3, 3, 3], [None] * 3, [0, 2, 0], [0, 0, 1]]
    counts = [[4, 4, 4], [4, 4, 4], [4, 2, 4], [1, 4, 0], [4, 4, 4], [4, 4, 4], [0, 0, 0], [4, 4, 4]]
    with torch.inference_mode():
        model = DecodingModel(chunk, 64)
        batch = Batch(model, prompts, Sampling(), Oracle(texts, wrong, counts), Chance([None] * 3))
        grown = [round.tokens for round in batch.start()]
        for places, most in zip(wrong, counts, strict=True):
            for row, round in enumerate(batch.advance(4)):
                place = places[row]
                assert round.drafted == most[row]
                assert len(round.tokens) == 1 + min(most[row], 4 if place is None else place)
                grown[row] += round.tokens
    for prompt, text, tokens in zip(prompts, texts, grown, strict=True):
        assert tokens == text[len(prompt) : len(prompt) + len(tokens)]


PROMPTS = [[1], [7, 8, 9], [3, 4, 5, 3, 2, 7, 8], [0, 20, 13, 1, 2, 3, 2], [9, 4], [11]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("know", [True, False], ids=["taught", "random"])
def test_a_batch_writes_what_each_prompt_alone_gives(depth: int, dtype: torch.dtype, know: bool) -> None:
    """Rows accept different counts and end at different times: at an end of document, inside drafts or not, or at the
    length."""
    chunk = half_taught(depth) if know else random_model(depth, seed=depth, repeat=depth > 2)
    chunk = copy.deepcopy(chunk).to(dtype)
    ends, endings = {}, set()
    for end, gamma in ((5, 3), (9, 5), (11, 1), (4, 2)):
        alone = [decode(chunk, prompt, "plain", end=end) for prompt in PROMPTS]
        for mode in ("plain", "speculative"):
            config = DecodeConfig(mode=mode, max_new_tokens=24, draft=gamma)
            pieces: list[tuple[int, list[int]]] = []
            heard = lambda text, pieces=pieces: pieces.append((text.number, text.latest))  # noqa: E731
            together = generate_batch(chunk, PROMPTS, config, end=end, progress=heard)
            shown = [[token for number, piece in pieces if number == row for token in piece] for row in range(len(PROMPTS))]
            assert [result.tokens for result in together] == [result.tokens for result in alone] == shown
            assert [result.ending for result in together] == [result.ending for result in alone]
            for result in together:
                check_counts(result.statistics, len(result.tokens))
            endings |= {result.ending for result in together}
        ends[end] = {len(result.tokens) for result in together}
    assert max(map(len, ends.values())) > 1
    assert "end_of_document" in endings


def test_a_seeded_text_does_not_depend_on_its_batch() -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    config = DecodeConfig(mode="speculative", **settings)  # type: ignore[arg-type]
    texts = [NewText(prompt, 20, generator=torch.Generator().manual_seed(row)) for row, prompt in enumerate(PROMPTS)]
    together = generate_batch(half_taught(), texts, config, end=4)
    alone = [decode(half_taught(), p, "speculative", seed=row, end=4, **settings) for row, p in enumerate(PROMPTS)]
    assert len({len(result.tokens) for result in alone}) > 1
    assert [result.tokens for result in together] == [result.tokens for result in alone]


@pytest.mark.parametrize("rows", [2, 6])
def test_a_text_that_is_ended_from_outside_leaves_the_others_alone(rows: int) -> None:
    """Rows with limits of their own; one is not wanted any more after its fifth token and is seen no more."""
    chunk, limits = half_taught(), [24, 3, 24, 9, 1, 16]
    config = DecodeConfig(mode="speculative", draft=3)
    heard: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    dropped_after = 0

    def follow(text: Growing) -> None:
        nonlocal dropped_after
        heard[text.number] += text.latest
        if text.number == 2 and len(text.tokens) >= 5:
            text.ending, dropped_after = "not wanted", len(text.tokens)

    new = [NewText(prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    texts = generate_batch(chunk, new, config, rows=rows, progress=follow)
    assert 5 <= dropped_after == len(texts[2].tokens) < 24
    for row, prompt in enumerate(PROMPTS):
        alone = decode(chunk, prompt, "plain", max_new_tokens=limits[row]).tokens
        assert texts[row].tokens == heard[row] == alone[: dropped_after if row == 2 else None]
        assert texts[row].ending == ("not wanted" if row == 2 else "length")


def exact_texts(chunk: Chunk, prompt: list[int], sampling: Sampling, length: int, vocabulary: int) -> Tensor:
    """Probability of every text of ``length`` tokens, by enumeration with uncached passes of the trunk."""
    model = DecodingModel(chunk, 16)
    table = torch.ones((vocabulary,) * length, dtype=torch.float64)
    with torch.inference_mode():
        for text in itertools.product(range(vocabulary), repeat=length):
            tokens = torch.tensor([[*prompt, *text]])
            after = model.trunk(tokens, model.caches(1)).after_norm
            steps = sampling.probabilities(model.logits(after[0, len(prompt) - 1 : -1]).double())
            table[text] = steps.gather(1, torch.tensor(text).unsqueeze(1)).prod()
    return table


SAMPLINGS = [Sampling(1.0), Sampling(0.8, 2, 0.95)]


def sampled_deviation(sampling: Sampling, texts: int = 800) -> float:
    chunk, prompt = random_model(2, seed=11, vocabulary=3, layers=1, std=0.25), [0, 2]
    expected = exact_texts(chunk, prompt, sampling, 3, 3) * texts
    config = DecodeConfig(
        mode="speculative", max_new_tokens=3, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(3, 3, 3)
    for _ in range(texts):
        counts[tuple(generate(chunk, prompt, config, generator=generator).tokens)] += 1
    return excess(counts, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["temperature_1", "all_three"])
def test_sampled_texts_are_distributed_as_the_trunk_alone_writes_them(sampling: Sampling) -> None:
    assert sampled_deviation(sampling) < 1


def test_the_same_test_finds_an_engine_that_accepts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0]))
    assert sampled_deviation(SAMPLINGS[0]) > 1


def test_a_seed_repeats_a_sampled_text() -> None:
    first, again, other = (
        decode(random_model(2), [1], "speculative", temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)
    )
    assert first == again != other


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        decode(random_model(1), [], "plain")


def test_bfloat16_tokens_are_the_trunks_choice_within_rounding() -> None:
    """Passes of one and of several tokens round differently, so a near tie may fall either way, and nothing else."""
    chunk, prompt = random_model(2, dtype=torch.bfloat16, seed=3), [1, 2, 3]
    tokens = decode(chunk, prompt, "speculative", draft=3).tokens
    model = DecodingModel(chunk, 32)
    with torch.inference_mode():
        after = model.trunk(torch.tensor([prompt + tokens]), model.caches(1)).after_norm
        scores = model.logits(after[0, len(prompt) - 1 : -1]).log_softmax(-1)
    gaps = scores.amax(-1) - scores.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    # bfloat16 keeps 8 bits; two layers and the head add a few roundings up.
    assert gaps.max() < 2**-5 * scores.abs().max()
