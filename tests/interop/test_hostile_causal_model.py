"""Promise: a Hugging Face folder of unknown origin drafts with the weights that its files hold, or is refused in one line.
Nothing outside of it is opened, no pickle is loaded, and it cannot ask for more memory than its weights take."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_dist.checkpoint.manifest import TOKENIZER
from mtp_dist.config.schema import Export, MTPConfig
from mtp_dist.errors import UserError
from mtp_dist.export import export
from mtp_dist.interop.causal_model import WEIGHTS, WEIGHTS_INDEX, load_causal_model, require_usable
from tests.decoding.models import random_model
from tests.decoding.test_generate import save
from tests.hostile import KINDS, no_hang, put

LARGE = 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("ours") / "step_00000060", random_model(1, vocabulary=264), MTPConfig(depth=1))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "exported"
    return export(Export(checkpoint=str(checkpoint), out=str(out), dtype="float32", heads=False))


@pytest.fixture
def own(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "own")


def use(folder: Path, checkpoint: Path) -> torch.nn.Module:
    require_usable(folder, "decode.draft_model", checkpoint / TOKENIZER)
    return load_causal_model(folder, "decode.draft_model", torch.float32)


def refused(folder: Path, checkpoint: Path, word: str) -> None:
    with no_hang(60), pytest.raises(UserError) as caught:
        use(folder, checkpoint)
    text = str(caught.value)
    assert "\n" not in text and "own" in text and word in text, text


def test_what_is_right_is_loaded(own: Path, checkpoint: Path) -> None:
    stored = load_file(own / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(use(own, checkpoint).get_input_embeddings().weight, stored)  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", WEIGHTS, "generation_config.json"])
def test_what_is_no_file_is_not_read(own: Path, checkpoint: Path, file: str, kind: str) -> None:
    put(kind, own / file)
    if kind == "folder" and file == "generation_config.json":
        (own / file).rmdir()  # a folder beside the files is no file of it
        (own / file).symlink_to("/dev/zero")
    refused(own, checkpoint, file.partition(".")[0])


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "layers": (lambda c: c.update(num_hidden_layers=LARGE), "layers"),
    "a layer more": (lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1), "lack"),
    "vocabulary": (lambda c: c.update(vocab_size=LARGE), "embed_tokens"),
    "hidden": (lambda c: c.update(hidden_size=1 << 40), "cannot be read"),
    "mlp": (lambda c: c.update(intermediate_size=LARGE), "mlp"),
    "layers as text": (lambda c: c.update(num_hidden_layers="many"), "cannot be read"),
    "code": (lambda c: c.update(model_type="own", auto_map={"AutoConfig": "evil.Config"}), "cannot be read"),
    "another model": (lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "cannot be read"),
    "nothing": (lambda c: c.clear(), "cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_description_of_another_model(own: Path, checkpoint: Path, case: str) -> None:
    edit, word = CONFIGS[case]
    change(own / "config.json", edit)
    (own / "evil.py").write_text("raise SystemExit('run')")
    refused(own, checkpoint, word)


@pytest.mark.parametrize("content", ["", "[]", "[" * 50_000, '{"hidden": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}'], ids=range(5))
def test_a_description_that_is_no_document(own: Path, checkpoint: Path, content: str) -> None:
    (own / "config.json").write_text(content)
    refused(own, checkpoint, "config.json")


def test_integers_are_no_weights(own: Path, checkpoint: Path) -> None:
    tensors = load_file(own / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int32)
    save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
    refused(own, checkpoint, "model.norm.weight is stored as I32")


def test_a_weight_that_is_missing_is_not_drawn_at_random(own: Path, checkpoint: Path) -> None:
    tensors = load_file(own / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
    refused(own, checkpoint, "lack model.norm.weight")


def test_pickles_are_not_loaded(own: Path, checkpoint: Path) -> None:
    torch.save(load_file(own / WEIGHTS), own / "pytorch_model.bin")
    (own / WEIGHTS).unlink()
    refused(own, checkpoint, WEIGHTS)


def test_an_adapter_is_not_followed(own: Path, checkpoint: Path) -> None:
    (own / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused(own, checkpoint, "adapter")


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/b.safetensors", "x.bin", "", 7])
def test_the_index_names_files_of_its_folder(own: Path, checkpoint: Path, place: Any) -> None:
    names = list(load_file(own / WEIGHTS))
    (own / WEIGHTS).rename(own.parent / "elsewhere.safetensors")
    (own / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}))
    refused(own, checkpoint, WEIGHTS_INDEX)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(own: Path, checkpoint: Path) -> None:
    (own / WEIGHTS).rename(own.parent / "elsewhere")
    (own / WEIGHTS).symlink_to("../elsewhere")
    refused(own, checkpoint, "a link out of the folder")
    hub = own.parent / "hub" / "models--own"
    (hub / "blobs").mkdir(parents=True)
    (own / WEIGHTS).unlink()
    (own.parent / "elsewhere").rename(hub / "blobs" / "0a1b")
    (own / WEIGHTS).symlink_to("../../blobs/0a1b")
    snapshot = shutil.copytree(own, hub / "snapshots" / "main", symlinks=True)
    assert use(snapshot, checkpoint)


@pytest.mark.parametrize("raw", [b"", b"\x01", b"\0" * 8, b"\xff" * 8, (2).to_bytes(8, "little") + b"[]"], ids=range(5))
def test_a_header_that_cannot_be_read(own: Path, checkpoint: Path, raw: bytes) -> None:
    (own / WEIGHTS).write_bytes(raw)
    refused(own, checkpoint, WEIGHTS)
