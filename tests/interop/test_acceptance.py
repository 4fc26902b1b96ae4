"""Promise: transformers' ``generate(use_mtp=True)`` on an exported folder gives our tokens, and accepts as many drafts in each
round as we do. That pins what texts alone do not show: the order of W_k's halves, and which norms stand where.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, Export, MTPConfig
from mtp_dist.decoding.engine import generate_batch
from mtp_dist.export import export
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import SENTENCE, save

VOCABULARY, END, LAYERS, LENGTH = 257, 256, 2, 32
PROMPTS = ("fox jump", "gray", "x", "mpe", "ed gray fox jumped gr")


@dataclass(frozen=True)
class Told:
    """A text's tokens, and the drafts accepted in each round but the last, which may be cut at the length."""

    tokens: list[int]
    accepted: list[int]


def readable(depth: int) -> list[str]:
    """The prompts that transformers takes: those of D tokens at least."""
    return [prompt for prompt in PROMPTS if len(prompt) >= depth]


@pytest.fixture(scope="module", params=[(1, "embedding_first"), (2, "hidden_first"), (3, "embedding_first")], ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of D modules that know a sentence, but not perfectly. No two norms are alike."""
    depth, concat = request.param
    chunk = random_model(depth, std=0.02, vocabulary=VOCABULARY, layers=LAYERS, concat=concat)
    generator = torch.Generator().manual_seed(depth)
    for p in chunk.parameters():
        if p.dim() == 1:
            p.data.uniform_(0.3, 3, generator=generator)
    taught(chunk, list(SENTENCE.encode()), steps=40)
    return save(tmp_path_factory.mktemp("acceptance") / "step_1", chunk, MTPConfig(depth=depth, concat=concat))


def ours(checkpoint: Path) -> list[Told]:
    model, told = Checkpoint(checkpoint).load_model(), []
    for prompt in readable(model.depth):
        rounds: list[int] = []
        config = DecodeConfig(max_new_tokens=LENGTH)
        heard = lambda text, rounds=rounds: rounds.append(text.new)  # noqa: E731
        (result,) = generate_batch(model, [list(prompt.encode())], config, end=END, vocabulary=VOCABULARY, progress=heard)
        # The first one is the prompt's pass, which has no drafts.
        told.append(Told(result.tokens, [count - 1 for count in rounds[1:-1]]))
    return told


def theirs(exported: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> list[Told]:
    modules = [rf"model\.layers\.{LAYERS + k}\..*" for k in range(depth)]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", modules)
    matches: list[int] = []
    original = MTPCandidateGenerator.get_candidates

    def recorded(self: MTPCandidateGenerator, *arguments: object, n_last_matches: int, **keywords: object) -> object:
        matches.append(int(n_last_matches))
        return original(self, *arguments, n_last_matches=n_last_matches, **keywords)

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", recorded)
    model, told = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32), []
    for prompt in readable(depth):
        matches.clear()
        given = torch.tensor([list(prompt.encode())])
        settings = {"max_new_tokens": LENGTH, "do_sample": False, "use_mtp": True}
        found = model.generate(given, attention_mask=torch.ones_like(given), **settings)
        # A call tells the round before: the first call none, the second the prompt's pass.
        told.append(Told(found[0, given.shape[1] :].tolist(), matches[2:]))
    return told


def test_tokens_and_accepted_drafts(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = Checkpoint(saved).config.mtp.depth
    exported = export(Export(checkpoint=str(saved), out=str(tmp_path / "out"), dtype="float32"))
    expected = ours(saved)
    assert theirs(exported, monkeypatch, depth) == expected
    counts = {count for told in expected for count in told.accepted}
    assert len(counts) >= min(depth + 1, 3), "different counts have to occur, or equality proves little"


def test_what_docs_say_that_transformers_refuses(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should this fail, a newer transformers can do more than docs/export.md says."""
    depth = Checkpoint(saved).config.mtp.depth
    out = export(Export(checkpoint=str(saved), out=str(tmp_path / "out"), dtype="float32"))
    early = AutoModelForCausalLM.from_pretrained(out)
    modules = [rf"model\.layers\.{LAYERS + k}\..*" for k in range(depth)]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", modules)
    model = AutoModelForCausalLM.from_pretrained(out)

    def write(model: LlamaForCausalLM, *shape: int, token: int = 97) -> torch.Tensor:
        given = torch.full(shape, token)
        return model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False, use_mtp=True)

    for token in range(97, 105):
        assert write(model, 1, depth, token=token).shape[1] > depth
    with pytest.raises(ValueError, match="batch_size = 1"):
        write(model, 2, 4)
    if depth > 1:
        faults = []
        for token in range(97, 105):  # where all drafts of the first round are accepted, nothing is missed
            with contextlib.suppress(RuntimeError):
                write(model, 1, depth - 1, token=token)
                continue
            faults.append(token)
        assert faults
    with pytest.raises(ValueError, match="does not seem to register any known MTP layer patterns"):
        write(early, 1, 4)
