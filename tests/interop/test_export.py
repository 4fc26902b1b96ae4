"""Promise: transformers, which knows nothing of this project, reads an exported folder as the same model: same logits, same
drafts, same text.

Tolerance, float32: the two implementations differ by the order of sums only; see tests/distributed/comparison.py.
"""

import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, Export
from mtp_dist.data.encoder import TextEncoder
from mtp_dist.data.tokenizer import END_OF_DOCUMENT
from mtp_dist.decoding.cache import KeyValues
from mtp_dist.decoding.engine import generate
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.errors import UserError
from mtp_dist.export import export
from mtp_dist.interop.weight_file import Description, write
from mtp_dist.model.chunk import Chunk

TOLERANCE = 1e-5
LAYERS, DEPTH = 4, 2
VOCABULARY = 257  # of the byte tokenizer; the models have 264 rows
PROMPTS = ([97, 104, 111], [50, 51, 65, 66, 67, 90, 120, 110, 100, 48])
KINDS = ("tied", "untied")

Exporter = Callable[..., Path]


@pytest.fixture
def exported(checkpoints: dict[str, Path], tmp_path: Path) -> Exporter:
    def make(kind: str, **settings: Any) -> Path:
        out = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        return export(Export(checkpoint=str(checkpoints[kind]), out=str(out), **settings))

    return make


@pytest.fixture
def with_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' own classes of models with MTP modules declare."""
    modules = [rf"model\.layers\.{LAYERS + k}\..*" for k in range(DEPTH)]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", modules)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def trunk(model: Chunk, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, DecodingModel]:
    """Final states, logits, and the decoder's view of our model."""
    decoder = DecodingModel(model, 64)
    caches: list[KeyValues] = [decoder.cache(len(tokens)) for _ in model.layers]
    states = decoder.trunk(tokens, caches).after_norm
    return states, decoder.logits(states), decoder


@pytest.mark.parametrize("kind", KINDS)
def test_logits(checkpoints: dict[str, Path], exported: Exporter, kind: str) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(exported(kind), output_loading_info=True)
    assert theirs.dtype == torch.float32
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith((f"model.layers.{LAYERS}.", f"model.layers.{LAYERS + 1}.")) for key in info["unexpected_keys"])
    tokens = torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    _, expected, _ = trunk(Checkpoint(checkpoints[kind]).load_model(), tokens)
    with torch.no_grad():
        assert close(theirs(tokens).logits, expected)
    assert expected.std() > 0.1, "flat logits prove nothing"


@pytest.mark.usefixtures("with_heads")
@pytest.mark.parametrize("kind", KINDS)
def test_drafts(checkpoints: dict[str, Path], exported: Exporter, kind: str) -> None:
    """Each MTP module's logits at every position, by transformers' own MTP model."""
    ours = Checkpoint(checkpoints[kind]).load_model()
    theirs = AutoModelForCausalLM.from_pretrained(exported(kind))
    heads = MtpModel.from_pretrained(theirs).eval()
    cache = MtpCache(config=theirs.config.get_mtp_config())
    tokens = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(1))
    states, _, decoder = trunk(ours, tokens)
    assert ours.mtp is not None
    with torch.no_grad():
        last = theirs(tokens, output_hidden_states=True).hidden_states[-1]
        count = tokens.shape[1] - DEPTH
        last, hidden = last[:, :count], states[:, :count]
        for k, module in enumerate(ours.mtp.values(), start=1):
            places = torch.arange(k, k + count).unsqueeze(0)
            last = heads.forward_layer(k - 1, last, places, cache, input_ids=tokens[:, k : k + count])
            state, hidden = decoder.module(module, k, hidden, tokens, decoder.cache(1), decoder.span([0], [count]))
            expected = decoder.logits(state)
            assert close(heads._project_to_logits(last), expected)
            assert expected.std() > 0.1


@pytest.mark.usefixtures("with_heads")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text(checkpoints: dict[str, Path], exported: Exporter, kind: str, prompt: list[int]) -> None:
    """Ours plainly, theirs plainly, and theirs speculatively with the exported heads."""
    model = Checkpoint(checkpoints[kind]).load_model()
    expected = generate(model, prompt, DecodeConfig(mode="plain", max_new_tokens=24), end=256, vocabulary=VOCABULARY).tokens
    theirs = AutoModelForCausalLM.from_pretrained(exported(kind))
    given = torch.tensor([prompt])
    for settings in ({}, {"use_mtp": True}):
        found = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, **settings)
        assert found[0, len(prompt) :].tolist() == expected


def test_tokenizer(checkpoints: dict[str, Path], exported: Exporter, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(exported("tied"))
    ours, end = TextEncoder.of_run(Checkpoint(checkpoints["tied"]).tokenizer_path, ""), END_OF_DOCUMENT
    # Text that spells the end token is text, as generate and training read it; so it is after saving the tokenizer once more.
    theirs.save_pretrained(tmp_path / "again")
    for reader in (theirs, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in ("def main():\n\treturn 'λ'", f"a{end}b", end, f" {end} ", "<s>[INST]<pad>"):
            ids = reader(text)["input_ids"]
            assert ids == ours.encode(text, "a text") == reader([text, "longer"])["input_ids"][0]
            assert 256 not in ids
            assert reader.decode(ids) == text
        assert reader.decode([*b"deja vu", 0xC3]) == "deja vu\ufffd"
        assert reader.eos_token_id == 256
        assert reader.decode([97, reader.eos_token_id], skip_special_tokens=True) == "a"


def test_padding_rows_are_never_drawn(exported: Exporter) -> None:
    """Logits of the rows beyond the tokenizer made the largest."""
    theirs = AutoModelForCausalLM.from_pretrained(exported("untied"))
    theirs.lm_head.weight.data[VOCABULARY:] = theirs.lm_head.weight.data[97] * 50
    theirs.lm_head.weight.data[VOCABULARY + 1] *= -1
    given = torch.tensor([PROMPTS[0]])
    raw = theirs(given).logits[0, -1]
    assert raw.argmax() >= VOCABULARY
    found = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8)
    assert int(found.max()) < VOCABULARY


def test_config(checkpoints: dict[str, Path], exported: Exporter) -> None:
    content = json.loads((exported("tied") / "config.json").read_text())
    model = Checkpoint(checkpoints["tied"]).config.model
    assert (content["num_mtp_layers"], content["num_hidden_layers"], content["dtype"]) == (DEPTH, LAYERS, "float32")
    assert content["vocab_size"] == model.vocab_size and content["head_dim"] == model.head_dim
    assert content["tie_word_embeddings"] is True


def test_bfloat16_is_the_rounded_float32(checkpoints: dict[str, Path], exported: Exporter) -> None:
    exact = load_file(exported("tied") / "model.safetensors")
    rounded = load_file(exported("tied", dtype="bfloat16") / "model.safetensors")
    assert rounded.keys() == exact.keys()
    for name, value in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert rounded[name].equal(value.to(torch.bfloat16))
    theirs = AutoModelForCausalLM.from_pretrained(exported("tied", dtype="bfloat16"))
    assert theirs.dtype == torch.bfloat16
    tokens = torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    _, expected, _ = trunk(Checkpoint(checkpoints["tied"]).load_model(torch.bfloat16), tokens)
    with torch.no_grad():
        # bfloat16 has 8 bits: each of some ten roundings on the way to a logit is up to 2^-9 of it.
        assert close(theirs(tokens).logits.float(), expected.float(), 0.05)


def test_shards_hold_every_tensor_once(exported: Exporter) -> None:
    whole = load_file(exported("untied") / "model.safetensors")
    largest = max(tensor.nbytes for tensor in whole.values())
    limit = 1.5 * largest
    out = exported("untied", shard_gb=limit / 1e9)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    held: dict[str, torch.Tensor] = {}
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in part)
        assert not held.keys() & part.keys()
        held |= part
    assert held.keys() == whole.keys() == index["weight_map"].keys()
    assert all(held[name].equal(whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.lm_head.weight.equal(whole["lm_head.weight"])


def test_one_tensor_at_a_time(exported: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, those before it are gone."""
    alive: list[weakref.ref] = []
    read, names = Checkpoint.read, []

    def counted(self: Checkpoint, name: str, part: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1  # the one that was written last
        values = read(self, name, part)
        alive.append(weakref.ref(values))
        names.append(name)
        return values

    monkeypatch.setattr(Checkpoint, "read", counted)
    exported("untied", shard_gb=1.0)
    assert len(names) == len(set(names)) > 9 * LAYERS


def test_a_weight_file_is_as_the_library_writes_it(tmp_path: Path) -> None:
    """Read by the library: both dtypes, odd shapes, values that do not lie together."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(4, 6, generator=generator)[:, ::2],
    }
    described = [Description(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    write(tmp_path / "own", described, iter(tensors.values()))
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "library", metadata={"format": "pt"})
    found, expected = load_file(tmp_path / "own"), load_file(tmp_path / "library")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) and found[name].dtype == value.dtype for name, value in expected.items())
    with safe_open(tmp_path / "own", framework="pt") as own:
        assert own.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "own").read_bytes()[:8], "little") % 8 == 0
    with pytest.raises(ValueError, match="was to be"):
        write(tmp_path / "wrong", described[:1], [tensors["a"].double()])


def test_what_cannot_be_exported(checkpoints: dict[str, Path], exported: Exporter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mtp\.h0=pre_norm.*heads=false"):
        exported("pre_norm")
    trunk_alone = exported("pre_norm", heads=False)
    assert json.loads((trunk_alone / "config.json").read_text())["dtype"] == "bfloat16"
    assert not any(f"layers.{LAYERS}." in name for name in load_file(trunk_alone / "model.safetensors"))
    with pytest.raises(UserError, match="exists"):
        export(Export(checkpoint=str(checkpoints["tied"]), out=str(trunk_alone)))
    with pytest.raises(UserError, match="format=gguf is not one of hf"):
        exported("tied", format="gguf")
    with pytest.raises(UserError, match="dtype=int8"):
        exported("tied", dtype="int8")
    with pytest.raises(UserError, match="out is empty"):
        export(Export(checkpoint=str(checkpoints["tied"])))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export(Export(checkpoint=str(checkpoints["tied"]), out=str(tmp_path / "file" / "below")))


def test_a_failed_export_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The command, where the largest file that may be written is smaller than the embedding."""
    out = tmp_path / "deep" / "out"
    done = subprocess.run(
        [sys.executable, "-m", "mtp_dist.export", f"checkpoint={checkpoints['tied']}", f"out={out}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (32_000, 32_000)),
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: out={out} cannot be written: ") and done.stderr.count("\n") == 1
    assert list((tmp_path / "deep").iterdir()) == []
