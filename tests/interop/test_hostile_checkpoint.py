"""Promise: whatever a checkpoint of unknown origin holds, with sums that are right, opening it names the file in one line or
gives the weights that its manifest describes. Nothing outside of its folder is opened, nothing that is no file is read, and no
more memory is taken than there is on disk."""

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.description import describe
from mtp_dist.checkpoint.manifest import CONFIG, MANIFEST, MANIFEST_SUM, TOKENIZER, read_manifest
from mtp_dist.checkpoint.reader import Checkpoint, open_checkpoint
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.errors import UserError
from mtp_dist.training.progress import Progress
from tests.hostile import KINDS, no_hang, put

Content = dict[str, Any]
RANK = "rank_00000.safetensors"
LARGE = 10**9


@pytest.fixture
def own(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may change; of two tensor ranks."""
    return shutil.copytree(checkpoints["untied"], tmp_path / "own")


def write(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    (path / MANIFEST_SUM).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")


def reseal(path: Path, change: Callable[[Content], Any] = lambda content: None) -> None:
    """Change the manifest, and give it sizes and sums of the files as they are now, and its own."""
    content = json.loads((path / MANIFEST).read_text())
    for name, record in content["files"].items():
        if (path / name).is_file():
            record.update(size=(path / name).stat().st_size, sha256=hashlib.sha256((path / name).read_bytes()).hexdigest())
    change(content)
    write(path, json.dumps(content).encode())


def load(path: Path) -> None:
    """Whatever a decoder and a resume read."""
    checkpoint = open_checkpoint(path)
    checkpoint.load_model()
    checkpoint.load_random_state(0, torch.device("cpu"))
    checkpoint.section("progress", Progress)
    describe(path, parameters=True)


def refused(path: Path, *words: str) -> None:
    with no_hang(), pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1500, text
    assert str(path) in text
    for word in words:
        assert re.search(word, text), text


def some(content: Content) -> Content:
    """The record of a parameter that lies in two boxes."""
    found: Content = content["parameters"]["embedding.weight"]
    return found


CHANGES: dict[str, tuple[Callable[[Content], Any], str]] = {
    "no files": (lambda c: c.update(files={}), "files does not list config.yaml"),
    "a file not listed": (lambda c: c["files"].pop(RANK), f"files does not list {RANK}"),
    "no tokenizer": (lambda c: c["files"].pop(TOKENIZER), "files does not list tokenizer.json"),
    "files as a list": (lambda c: c.update(files=[]), "files is a list, not an object"),
    "a size as text": (lambda c: c["files"][RANK].update(size="9"), r'size is "9", not an integer'),
    "a negative size": (lambda c: c["files"][RANK].update(size=-1), "size is -1"),
    "a sum of other length": (lambda c: c["files"][RANK].update(sha256="00"), "not a hexadecimal SHA-256"),
    "a sum null": (lambda c: c["files"][RANK].update(sha256=None), "sha256 is null"),
    "parameters null": (lambda c: c.update(parameters=None), "parameters is null, not an object"),
    "no parameters": (lambda c: c.update(parameters={}), "0 layers"),
    "a missing section": (lambda c: c.pop("optimizer"), "optimizer is missing"),
    "an unknown section": (lambda c: c.update(more=1), "more is not a field"),
    "the step as text": (lambda c: c.update(step="6"), r'step is "6"'),
    "the step as truth": (lambda c: c.update(step=True), "step is true"),
    "a huge step": (lambda c: c.update(step=10**30), "more than 64 bits"),
    "another format": (lambda c: c.update(format="mtp_dist.checkpoint/9"), "format 'mtp_dist.checkpoint/9'"),
    "no format": (lambda c: c.pop("format"), "format 'None'"),
    "the format as a list": (lambda c: c.update(format=["x"]), "format"),
    "progress as text": (lambda c: c["progress"].update(tokens_seen="9"), "progress.tokens_seen"),
    "unknown progress": (lambda c: c["progress"].update(more=1), "progress.more is not a field"),
    "a shape as text": (lambda c: some(c).update(shape="9"), r"embedding\.weight\.shape"),
    "a negative shape": (lambda c: some(c).update(shape=[-265, -32]), "embedding"),
    "a zero shape": (lambda c: some(c).update(shape=[0, 32]), "shape"),
    "an empty shape": (lambda c: some(c).update(shape=[]), "shape"),
    "a huge shape": (lambda c: some(c).update(shape=[LARGE, LARGE]), "embedding.weight"),
    "a huge box": (lambda c: some(c)["fragments"][0].update(shape=[LARGE, LARGE], end=LARGE**2), "embedding.weight"),
    "a huge fragment": (
        lambda c: some(c).update(
            shape=[LARGE, 32], fragments=[some(c)["fragments"][0] | {"shape": [LARGE, 32], "begin": 0, "end": 32 * LARGE}]
        ),
        f"{RANK} is \\d+ bytes; its fragments take",
    ),
    "another shape of as many": (lambda c: some(c).update(shape=some(c)["shape"][::-1]), "embedding"),
    "one dimension more": (lambda c: some(c).update(shape=[1, *some(c)["shape"]]), "embedding"),
    "no fragments": (lambda c: some(c).update(fragments=[]), "hold 0 of 265"),
    "a fragment less": (lambda c: some(c)["fragments"].pop(), r"hold \d+ of 265"),
    "a fragment twice": (lambda c: some(c)["fragments"].append(some(c)["fragments"][0]), "held by none or twice"),
    "a gap": (lambda c: some(c)["fragments"][0].update(begin=1), "elements 0 to 1"),
    "boxes that overlap": (lambda c: some(c)["fragments"][1].update(start=[131, 0]), "does not continue"),
    "a box outside": (lambda c: some(c)["fragments"][1].update(start=[LARGE, 0]), "does not continue"),
    "a negative start": (lambda c: some(c)["fragments"][0].update(start=[-1, 0]), "a box cannot begin"),
    "backwards": (lambda c: some(c)["fragments"][0].update(begin=9, end=3), "elements 9 to 3"),
    "another key": (lambda c: some(c)["fragments"][0].update(key="nothing"), f"{RANK} cannot be read"),
    "a fragment as a list": (lambda c: some(c)["fragments"].__setitem__(0, []), r"fragments\[0\] is a list"),
    "moments as text": (lambda c: some(c).update(moments="yes"), "moments"),
    "a layer less": (lambda c: [c["parameters"].pop(n) for n in [*c["parameters"]] if n.startswith("layers.3.")], "3 layers"),
    "a parameter less": (lambda c: c["parameters"].pop("norm.weight"), "has no parameter norm.weight"),
    "a module less": (lambda c: [c["parameters"].pop(n) for n in [*c["parameters"]] if n.startswith("mtp.2.")], "fewer modules"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_sealed_manifest_that_misleads(own: Path, case: str) -> None:
    change, words = CHANGES[case]
    reseal(own, change)
    refused(own, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"step": ' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b'{"step": 1, "step": 2}', "twice"),
        (b'{"step": Infinity}', "Infinity"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"format": "\\udcff"}', "surrogate"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_manifest_that_is_no_document(own: Path, content: bytes, words: str) -> None:
    write(own, content)
    refused(own, f"{MANIFEST} is damaged", words)


@pytest.mark.parametrize("name", ["../own/{}", "/etc/passwd", "sub/{}", "./{}", "", "..", "a\0b", "x\\{}"])
@pytest.mark.parametrize("place", ["fragment", "files"])
def test_names_lead_nowhere_else(own: Path, name: str, place: str) -> None:
    def change(content: Content) -> None:
        if place == "fragment":
            some(content)["fragments"][0]["file"] = name.format(RANK)
        else:
            content["files"][name.format(RANK)] = content["files"].pop(RANK)

    reseal(own, change)
    refused(own, "not the name of a file inside")


FILES = (MANIFEST, MANIFEST_SUM, CONFIG, TOKENIZER, RANK)


@pytest.mark.parametrize("file", FILES[2:])
def test_links_do_not_leave_the_folder(own: Path, file: str) -> None:
    (own / file).rename(own.parent / "elsewhere")
    (own / file).symlink_to(own.parent / "elsewhere")
    refused(own, f"{file} is a link out of")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_not_read(own: Path, file: str, kind: str) -> None:
    put(kind, own / file)
    refused(own, str(own) if file == MANIFEST else file)


def split(path: Path) -> tuple[Content, bytes]:
    """Header and values of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: bytes, values: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + values


def with_tensor(**fields: Any) -> Callable[[Content, bytes], bytes]:
    """One tensor described otherwise."""

    def make(header: Content, values: bytes) -> bytes:
        name = next(key for key in header if key.startswith("embedding.weight") and key.endswith(".master"))
        header[name] |= fields
        return joined(json.dumps(header).encode(), values)

    return make


def twice(header: Content, values: bytes) -> bytes:
    name, entry = next(iter(header.items()))
    return joined(f"{{{json.dumps(name)}: {json.dumps(entry)}, {json.dumps(header)[1:]}".encode(), values)


HEADERS: dict[str, Callable[[Content, bytes], bytes]] = {
    "an empty file": lambda header, values: b"",
    "half a length": lambda header, values: b"\x01\x00\x00",
    "no header": lambda header, values: joined(b"", values),
    "longer than the file": lambda header, values: joined(b"{}", b"", 1 << 40),
    "the largest length": lambda header, values: joined(b"{}", b"", (1 << 64) - 1),
    "not JSON": lambda header, values: joined(b"{nothing", values),
    "a list": lambda header, values: joined(b"[]      ", values),
    "a number": lambda header, values: joined(b"1       ", values),
    "not UTF-8": lambda header, values: joined(b'{"\xff\xfe": 1}', values),
    "deeply nested": lambda header, values: joined(b'{"a":' + b"[" * 100_000, values),
    "a huge number": lambda header, values: joined(b'{"a": ' + b"9" * 5000 + b"}", values),
    "no tensors": lambda header, values: joined(b"{}", values),
    "an unknown dtype": with_tensor(dtype="Q99"),
    "a dtype as number": with_tensor(dtype=7),
    "integers": with_tensor(dtype="I32"),
    "unsigned integers": with_tensor(dtype="U32"),
    "half as wide": with_tensor(dtype="BF16"),
    "a negative shape": with_tensor(shape=[-1]),
    "a huge shape": with_tensor(shape=[1 << 62, 1 << 62]),
    "a shape as text": with_tensor(shape="4"),
    "another product": with_tensor(shape=[7]),
    "two dimensions": with_tensor(shape=[2, 2112]),
    "offsets outside": with_tensor(data_offsets=[0, 1 << 50]),
    "offsets backwards": with_tensor(data_offsets=[100, 0]),
    "negative offsets": with_tensor(data_offsets=[-4, 0]),
    "offsets that overlap": with_tensor(data_offsets=[0, 4]),
    "three offsets": with_tensor(data_offsets=[0, 4, 8]),
    "a name twice": twice,
    "values cut": lambda header, values: joined(json.dumps(header).encode(), values[:-4]),
    "values beyond": lambda header, values: joined(json.dumps(header).encode(), values + b"\0" * 8),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_misleads(own: Path, case: str) -> None:
    (own / RANK).write_bytes(HEADERS[case](*split(own / RANK)))
    reseal(own)
    refused(own, RANK)


def test_float32_read_as_integers_would_be_other_weights(own: Path) -> None:
    """By the library's own writer: a file without any fault, but for the type."""
    tensors = load_file(own / RANK)
    name = next(key for key in tensors if key.startswith("embedding.weight") and key.endswith(".master"))
    tensors[name] = tensors[name].view(torch.int32)
    save_file(tensors, own / RANK)
    reseal(own)
    refused(own, RANK, "as I32 .*; expected F32")


def test_a_state_of_another_generator(own: Path) -> None:
    tensors = load_file(own / RANK)
    tensors["rng.cpu"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, own / RANK)
    reseal(own)
    refused(own, f"{RANK} holds no state of a random generator")


SETTINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "layers": (lambda text: text.replace("  layers: 4\n", f"  layers: {LARGE}\n"), f"model.layers={LARGE}"),
    "fewer layers": (lambda text: text.replace("  layers: 4\n", "  layers: 2\n"), "model.layers=2"),
    "no layers": (lambda text: text.replace("  layers: 4\n", "  layers: 0\n"), "model.layers"),
    "hidden": (lambda text: text.replace("  hidden: 32\n", f"  hidden: {LARGE}\n"), "model.hidden="),
    "vocabulary": (lambda text: re.sub("vocab_size: .*", f"vocab_size: {LARGE}", text), "model.vocab_size="),
    "no vocabulary": (lambda text: re.sub("vocab_size: .*", "vocab_size: null", text), "vocab_size"),
    "mlp": (lambda text: re.sub("  mlp: .*", f"  mlp: {LARGE}", text), "model.mlp="),
    "heads": (lambda text: re.sub("  heads: [0-9]+", f"  heads: {2 * LARGE}", text), "model.heads="),
    "head_dim": (lambda text: re.sub("head_dim: .*", f"head_dim: {LARGE}", text), "model.head_dim="),
    "depth": (lambda text: re.sub("  depth: .*", f"  depth: {LARGE}", text), f"mtp.depth={LARGE}"),
    "blocks": (lambda text: re.sub("  blocks: .*", f"  blocks: {LARGE}", text), f"mtp.blocks={LARGE}"),
    "text for a number": (lambda text: text.replace("  layers: 4\n", "  layers: many\n"), "model.layers"),
    "digits": (lambda text: text.replace("  layers: 4\n", f"  layers: {'9' * 5000}\n"), CONFIG),
    "not a mapping": (lambda text: "- 1\n- 2\n", "does not hold settings"),
    "nothing": (lambda text: "", CONFIG),
    "no YAML": (lambda text: "a: [", "not valid YAML"),
    "deep": (lambda text: "a: " + "[" * 50_000, CONFIG),
    "laughs": (
        lambda text: "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
        "refers to an anchor",
    ),
    "a date": (lambda text: text + "more: 2026-99-99\n", CONFIG),
    "a tag": (lambda text: text + "more: !!python/object/apply:os.system [ls]\n", CONFIG),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_another_model(own: Path, case: str) -> None:
    change, words = SETTINGS[case]
    before = (own / CONFIG).read_text()
    (own / CONFIG).write_text(change(before))
    assert (own / CONFIG).read_text() != before
    reseal(own)
    refused(own, words)
    with no_hang(), pytest.raises(UserError):
        load_settings(own)


def test_settings_without_end(own: Path) -> None:
    with (own / CONFIG).open("wb") as file:
        file.truncate(1 << 30)
    with no_hang(), pytest.raises(UserError, match=f"{CONFIG} is 1073741824 bytes"):
        load_settings(own)


def test_a_parameter_of_another_shape_is_not_cut(own: Path) -> None:
    """One dimension larger in manifest and file than the model's: reading the model's part of it would be other weights."""
    name = "layers.1.mlp_norm.weight"
    record = read_manifest(own).parameters[name]
    (fragment,) = record.fragments
    tensors = load_file(own / fragment.file)
    for part in ("master", "exp_avg", "exp_avg_sq"):
        tensors[f"{fragment.key}.{part}"] = torch.ones(40)
    save_file(tensors, own / fragment.file)

    def change(content: Content) -> None:
        entry = content["parameters"][name]
        entry["shape"] = entry["fragments"][0]["shape"] = [40]
        entry["fragments"][0]["end"] = 40

    reseal(own, change)
    refused(own, f"{name} of shape .40., the model of shape .32.")


def test_the_newest_sound_one_is_taken(own: Path) -> None:
    """A hostile one is passed over like any damaged one."""
    run = own.parent / "run"
    for step in (6, 7):
        shutil.copytree(own, run / "checkpoints" / f"step_{step:08d}")
    reseal(run / "checkpoints" / "step_00000007", lambda content: content.update(files={}))
    assert folder.sound(run).name == "step_00000006"
    assert Checkpoint(folder.sound(run)).step == 6
