"""Promise: a model of transformers with the same tokenizer drafts, whatever its architecture, and texts stay the trunk's; its
cache says after any roll-back, in ragged batches too, what a fresh one would say."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from mtp_dist.checkpoint.manifest import TOKENIZER
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, Export, Generation, MTPConfig
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.drafter import Drafter
from mtp_dist.decoding.engine import Generated, NewText, generate_batch
from mtp_dist.decoding.hugging_face import HuggingFaceDrafter
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Sampling
from mtp_dist.decoding.text import Texts
from mtp_dist.errors import UserError
from mtp_dist.export import export
from mtp_dist.generate import numbered, open_writer
from mtp_dist.interop.causal_model import load_causal_model
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import random_model, taught
from tests.decoding.roll_back import check_roll_back
from tests.decoding.test_generate import SENTENCE, save

VOCABULARY = 257
PROMPTS = [list(b"fox jump"), list(b"g"), list(b"jumped gray f"), list(b"a")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chunk = taught(random_model(2, std=0.02, vocabulary=VOCABULARY + 7), list(SENTENCE.encode()), steps=80)
    return save(tmp_path_factory.mktemp("ours") / "step_00000060", chunk, MTPConfig(depth=2))


@pytest.fixture(scope="module")
def trunk(checkpoint: Path) -> Chunk:
    return Checkpoint(checkpoint).load_model()


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Export(checkpoint=str(checkpoint), out=str(tmp_path_factory.mktemp("hf") / "exported"), dtype="float32"))


@pytest.fixture(scope="module")
def foreign(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture, with learned positions, taught the sentence roughly."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48, "bos_token_id": 256, "eos_token_id": 256}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCABULARY, resid_pdrop=0.0, attn_pdrop=0.0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    row = torch.tensor(list(SENTENCE.encode()) * 6)
    for step in range(40):
        tokens = row[step % 16 : step % 16 + 40].unsqueeze(0)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    shutil.copy(exported / TOKENIZER, folder / TOKENIZER)
    return folder


def decoded(trunk: Chunk, other: Any, rows: list[int], *, side_by_side: int | None = None, **settings: Any) -> list[Generated]:
    config = DecodeConfig(**{"mode": "speculative", "drafter": "model", "draft": 3, "max_new_tokens": 24, **settings})
    texts = [NewText(PROMPTS[row], config.max_new_tokens, generator=torch.Generator().manual_seed(row)) for row in rows]
    return generate_batch(trunk, texts, config, rows=side_by_side, end=256, vocabulary=VOCABULARY, draft_model=other)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_greedy_texts_are_the_trunks(trunk: Chunk, foreign: Path, rows: list[int]) -> None:
    other = load_causal_model(foreign, "decode.draft_model", torch.float32)
    plain = decoded(trunk, None, rows, mode="plain")
    drafted = decoded(trunk, other, rows)
    assert [text.tokens for text in drafted] == [text.tokens for text in plain]
    two = decoded(trunk, other, rows, side_by_side=2)
    assert [text.tokens for text in two] == [text.tokens for text in plain]
    accepted, reached = (sum(sum(getattr(text.statistics, name)) for text in drafted) for name in ("accepted", "reached"))
    assert accepted > 0
    assert accepted < reached or len(rows) == 1


def test_bytes_through_its_cache(trunk: Chunk, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of width 32 in float32: each pass writes its tokens' keys and values, and reads those of all slots."""
    passes: list[tuple[int, int]] = []
    run = HuggingFaceDrafter._run

    def recorded(drafter: HuggingFaceDrafter, texts: Texts, ends: list[int], *, last_only: bool = False) -> torch.Tensor:
        before = drafter.slots.shape[1]
        logits = run(drafter, texts, ends, last_only=last_only)
        if not last_only:  # of the loop, not of the prompt
            passes.append((drafter.slots.shape[1] - before, drafter.slots.shape[1]))
        return logits

    monkeypatch.setattr(HuggingFaceDrafter, "_run", recorded)
    (text,) = decoded(trunk, load_causal_model(foreign, "decode.draft_model", torch.float32), [0])
    entry = 2 * 32 * 4
    assert text.statistics.drafter_cache_written == entry * sum(width for width, _ in passes) > 0
    assert text.statistics.drafter_cache_read == entry * sum(slots for _, slots in passes)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_export_never_rejects_its_own_drafts(trunk: Chunk, exported: Path, temperature: float) -> None:
    other = load_causal_model(exported, "decode.draft_model", torch.float32)
    for text in decoded(trunk, other, [0, 1, 2, 3], temperature=temperature, max_new_tokens=23):
        assert text.statistics.accepted == text.statistics.drafted
        assert sum(text.statistics.accepted) > 0


def test_an_export_never_rejects_its_own_drafts_of_texts_that_join(trunk: Chunk, exported: Path) -> None:
    """Caches of whom is behind, and of whom is ahead, are filled up where they lack slots."""
    other = load_causal_model(exported, "decode.draft_model", torch.float32)
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        for text in decoded(trunk, other, rows, side_by_side=2, max_new_tokens=23):
            assert text.statistics.accepted == text.statistics.drafted
            assert sum(text.statistics.accepted) > 0


@torch.no_grad()
def test_drafts_equal_those_of_a_fresh_cache(trunk: Chunk, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After drafts of which each row accepts others, a row that leaves, and hidden slots that pile up."""
    other, unused = load_causal_model(foreign, "x", torch.float64), TrunkPass(torch.empty(0), torch.empty(0), {})
    model = DecodingModel(trunk, 40, vocabulary=VOCABULARY)
    noise = torch.Generator().manual_seed(0)
    for p in other.parameters():  # a model that knows the sentence looks at little more than the last token
        p += torch.empty_like(p).normal_(0, 0.5, generator=noise)

    cleared: list[HuggingFaceDrafter] = []
    clear = HuggingFaceDrafter._clear
    monkeypatch.setattr(HuggingFaceDrafter, "_clear", lambda drafter: (cleared.append(drafter), clear(drafter)))
    started: list[HuggingFaceDrafter] = []

    def start(prompts: Sequence[list[int]]) -> tuple[Texts, Drafter]:
        texts, drafter = Texts(prompts, 40, model.device), HuggingFaceDrafter(model, other, len(prompts), Sampling(), None)
        drafter.prefill(texts, unused)
        started.append(drafter)
        return texts, drafter

    def narrow() -> None:
        assert cleared.count(started[0]) == 1, "as it starts"
        model.capacity = 8

    check_roll_back(start, PROMPTS[:3], lambda number: 97 + number, narrow)
    assert cleared.count(started[0]) == 2


def test_texts_beyond_the_models_positions_get_no_drafts(trunk: Chunk, foreign: Path) -> None:
    other = load_causal_model(foreign, "decode.draft_model", torch.float32)
    [plain] = decoded(trunk, None, [0], mode="plain", max_new_tokens=60)
    [text] = decoded(trunk, other, [0], max_new_tokens=60)
    assert text.tokens == plain.tokens
    assert 0 < text.statistics.drafted[0] < text.statistics.forwards


def test_the_command_reads_a_folder_of_hugging_face(checkpoint: Path, exported: Path) -> None:
    decode = DecodeConfig(drafter="model", draft_model=str(exported), draft=3, max_new_tokens=20)
    config = Generation(checkpoint=str(checkpoint), prompt="fox jump", decode=decode)
    _, writer, encoded = open_writer(config, ["fox jump"])
    [item] = writer.write(numbered(["fox jump"], encoded))
    assert item.texts["speculative"].startswith("ed gray fox")
    statistics = item.results["speculative"].statistics
    assert statistics.accepted == statistics.drafted
    assert sum(statistics.drafted) > 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tokenizer", "has another tokenizer than the checkpoint (258 tokens instead of 257, and 0 of those are missing"),
        ("numbers", "and 2 of those are missing or have other numbers); choose a model with the same tokenizer"),
        ("none", "has no tokenizer.json to compare"),
        ("rows", "has 99 rows for 257 tokens"),
        ("config", "config.json cannot be read"),
        ("transformers", "needs transformers; pip install 'mtp_dist[hf]'"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line_before_any_weight_is_read(
    fault: str, message: str, checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").unlink()
    if fault == "tokenizer":
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["fox"])
        tokenizer.save(str(folder / TOKENIZER))
    elif fault == "numbers":
        content = json.loads((folder / TOKENIZER).read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / TOKENIZER).write_text(json.dumps(content))
    elif fault == "none":
        (folder / TOKENIZER).unlink()
    elif fault == "rows":
        (folder / "config.json").write_text(json.dumps({"vocab_size": 99}))
    elif fault == "config":
        (folder / "config.json").write_text("{")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch, "empty", None)  # weights cannot be loaded without it
    config = Generation(checkpoint=str(checkpoint), prompt="a", decode=DecodeConfig(drafter="model", draft_model=str(folder)))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_writer(config, ["a"])
    assert "\n" not in str(caught.value)


def test_what_transformers_cannot_read_or_roll_back_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing known", "vocab_size": 300}))
    with pytest.raises(UserError, match=r"x=.* cannot be read as a causal model: ") as caught:
        load_causal_model(tmp_path, "x", torch.float32)
    assert "\n" not in str(caught.value)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 300}
    AutoModelForCausalLM.from_config(MambaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="keeps a state that cannot forget rejected drafts"):
        load_causal_model(tmp_path, "x", torch.float32)
