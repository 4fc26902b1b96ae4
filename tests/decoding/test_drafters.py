"""Whoever drafts, texts are the trunk's own: the same greedy tokens, and samples from the same distribution."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import verification
from mtp_dist.decoding.drafter import Drafter
from mtp_dist.decoding.drafters import draft_length
from mtp_dist.decoding.engine import NewText, generate_batch
from mtp_dist.decoding.lookup import Followers
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling
from mtp_dist.decoding.small_model import ModelDrafter
from mtp_dist.decoding.text import Texts
from mtp_dist.model.chunk import Chunk
from tests.decoding.chi_square import excess
from tests.decoding.models import random_model, taught
from tests.decoding.roll_back import check_roll_back
from tests.decoding.test_engine import PATTERN, exact_texts

# A vocabulary of three: drafts are right by chance, and wrong as often.
TINY: dict[str, Any] = {"vocabulary": 3, "layers": 1, "std": 0.35, "tie": False}
TINY_OF: dict[str, Any] = {"eagle of few tokens": {"draft_tokens": [0, 2]}}
DRAFTERS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "two blocks": {"blocks": 2},
    "parallel": {"kind": "parallel"},
    "medusa": {"kind": "medusa", "projection": "own"},
    "notebook": {"kind": "notebook"},
    "eagle": {"kind": "eagle"},
    "eagle3": {"kind": "eagle3"},
    "eagle of few tokens": {"kind": "eagle", "draft_tokens": [2, 3, 4, 7, 9, 11, 14, 17, 22]},
    "ngram": {},
    "model": {},
}
TEXTS = [[7, 8, 9], [1], [3, 4, 5, 3, 2, 7, 8], [20, 13, 1, 2]]


@cache
def tiny(name: str, seed: int = 11) -> Chunk:
    return random_model(2, seed=seed, dtype=torch.float64, **{**TINY, **DRAFTERS[name], **TINY_OF.get(name, {})})


def settings(name: str, **others: Any) -> DecodeConfig:
    drafter = name if name in ("ngram", "model") else "heads"
    return DecodeConfig(mode="speculative", drafter=drafter, **others)


@cache
def learner(name: str, steps: int = 60) -> Chunk:
    """Knows a pattern, its heads only roughly: drafts are partly right."""
    chunk = taught(random_model(3, **{"layers": 1, "std": 0.02, "seed": 5, **DRAFTERS[name]}), PATTERN, steps=steps)
    assert chunk.mtp is not None
    generator = torch.Generator().manual_seed(0)
    for p in chunk.mtp.parameters():
        p.data += torch.empty_like(p).normal_(0, 0.1, generator=generator)
    return chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_texts_are_the_trunks(name: str, dtype: torch.dtype) -> None:
    accepted = rejected = 0
    chunk, other = (copy.deepcopy(learner(*key)).to(dtype) for key in ((name,), ("model", 25)))
    plain = DecodeConfig(mode="plain", max_new_tokens=20, stop_at_eos=False)
    alone = [generate_batch(chunk, [prompt], plain, end=8)[0].tokens for prompt in TEXTS]
    for gamma, rows in ((1, [0, 1, 2, 3]), (3, [0, 1, 2, 3]), (2, [1])):
        config = settings(name, max_new_tokens=20, stop_at_eos=False, draft=gamma)
        results = generate_batch(chunk, [TEXTS[row] for row in rows], config, end=8, draft_model=other)
        assert [result.tokens for result in results] == [alone[row] for row in rows]
        accepted += sum(sum(result.statistics.accepted) for result in results)
        rejected += sum(sum(result.statistics.reached) - sum(result.statistics.accepted) for result in results)
    assert accepted > 0
    assert rejected > 0


def deviation(name: str, rows: int = 2000, **sampling: Any) -> float:
    """Of the first three tokens, sampled in one batch, from the exact distribution of the trunk's texts."""
    chunk, prompt = tiny(name), [0, 2, 0]
    config = settings(name, max_new_tokens=3, draft=2, **sampling)
    exact = exact_texts(chunk, prompt, Sampling.of(config), 3, 3)
    texts = [NewText(prompt, 3, generator=torch.Generator().manual_seed(1000 + row)) for row in range(rows)]
    results = generate_batch(chunk, texts, config, draft_model=tiny("model", seed=12))
    counts = torch.zeros(3, 3, 3)
    for result in results:
        counts[tuple(result.tokens)] += 1
    return excess(counts, exact * rows)


@pytest.mark.parametrize("name", DRAFTERS)
def test_samples_are_the_trunks(name: str) -> None:
    assert deviation(name, temperature=1.0) < 1


@pytest.mark.parametrize("name", ["sequential", "parallel", "ngram", "model"])
def test_samples_with_all_settings_are_the_trunks(name: str) -> None:
    assert deviation(name, temperature=0.8, top_k=2, top_p=0.95) < 1


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_same_test_finds_a_verifier_that_accepts_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "acceptance", lambda drafts, p, q: torch.ones_like(p[..., 0]))
    assert deviation(name, temperature=1.0) > 1


def test_typical_acceptance_is_lossy_and_never_the_default() -> None:
    assert DecodeConfig().verify == "lossless"
    assert deviation("sequential", temperature=1.0, verify="typical") > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_never_rejects_its_own_drafts(temperature: float) -> None:
    """So its caches, rolled back and caught up with in a ragged batch, say what the trunk's say."""
    chunk = random_model(2, dtype=torch.float64, seed=3)
    config = DecodeConfig(mode="speculative", drafter="model", temperature=temperature, draft=3, max_new_tokens=23)
    prompts = [[1, 2, 3], [5], [7, 7, 1, 4, 9, 2]] * 4
    results = generate_batch(chunk, prompts, config, end=4, draft_model=chunk)
    for result in results:
        assert result.statistics.accepted == result.statistics.drafted
    # Which text ends at once is the machine's own chance: draws differ between processors.
    assert sum(sum(result.statistics.accepted) for result in results) > 0


@torch.no_grad()
def test_a_models_drafts_equal_those_from_rebuilt_caches() -> None:
    """After drafts of which each row accepts others, and a row that leaves: a stale cache would cost acceptance alone."""
    model = DecodingModel(random_model(1, dtype=torch.float64, seed=3), 48, end=4)
    unused = TrunkPass(torch.empty(0), torch.empty(0), {})

    def start(prompts: Sequence[list[int]]) -> tuple[Texts, Drafter]:
        texts, drafter = Texts(prompts, 48, model.device), ModelDrafter(model, len(prompts), Sampling(), None)
        drafter.prefill(texts, unused)
        return texts, drafter

    check_roll_back(start, [[1, 2, 3], [5], [7, 7, 1, 4, 9, 2]], lambda number: number)


def test_a_model_that_lacks_tokens_cannot_draft() -> None:
    config = DecodeConfig(mode="speculative", drafter="model")
    with pytest.raises(ValueError, match="a model of 3 tokens cannot draft for one of 23"):
        generate_batch(random_model(1), [[1]], config, draft_model=tiny("model"))


def test_lookup_by_hand() -> None:
    followers = Followers(longest=2)
    assert followers.guess(3) == []
    followers.extend([5, 6, 7, 8, 6, 9, 5])
    assert followers.guess(3) == [6, 7, 8]
    followers.extend([6])  # 5 6 stands before, though 6 alone stands later
    assert followers.guess(4) == [7, 8, 6, 9]
    followers.extend([4])
    assert followers.guess(2) == []
    followers.extend([1, 2, 1])
    assert followers.guess(5) == [2, 1, 2, 1, 2]  # the guess runs into itself


def test_the_draft_length_without_a_depth() -> None:
    assert draft_length(DecodeConfig(drafter="ngram"), 0) == 4
    assert draft_length(DecodeConfig(drafter="model", draft=6), 2) == 6
    assert draft_length(DecodeConfig(drafter="ngram", mode="plain"), 2) == 0
