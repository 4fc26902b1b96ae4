"""Promise: dataset.json is held to what it says. A changed bit is noticed; so is any content, resealed with a valid sum, that
contradicts itself, the tokenizer or the shards; nothing outside of the folder is opened, and nothing that is no file is read."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bit_flips import flip
from mtp_dist.config.command import application
from mtp_dist.config.schema import Inspection
from mtp_dist.data import token_counts
from mtp_dist.data.dataset import Dataset, file_sha256
from mtp_dist.data.manifest import MANIFEST, MANIFEST_SUM, UNSUMMED
from mtp_dist.data.reading import SampleReader, ShardError
from mtp_dist.data.shards import SplitWriter
from mtp_dist.errors import UserError
from mtp_dist.inspect import run
from tests.hostile import KINDS, no_hang, put

Content = dict[str, Any]
FLIPPED = 13
"""One bit of so many is flipped, another one in each byte."""


@pytest.fixture
def own(dataset: Dataset, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(dataset.path, tmp_path / "own")


def reseal(folder: Path, change: Callable[[Content], Any]) -> None:
    """Change dataset.json, with the sum that belongs to it."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    write(folder, json.dumps(content).encode())


def write(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_SUM).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")


def as_first_format(folder: Path) -> None:
    reseal(folder, lambda content: content.update(format=UNSUMMED))
    (folder / MANIFEST_SUM).unlink()


def read_all(folder: Path) -> None:
    found = Dataset.open(folder)
    for split in found.splits.values():
        SampleReader(split).read(0, split.documents)
    token_counts.token_counts(found)


def refused(folder: Path, *words: str) -> str:
    """The one line that says why; the whole dataset is read where opening it is not refused."""
    with no_hang(), pytest.raises(UserError) as caught:
        read_all(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    for word in words:
        assert re.search(word, text), text
    return text


def test_every_bit_of_the_manifest_and_its_sum_counts(own: Path) -> None:
    Dataset.open(own)
    for name in (MANIFEST, MANIFEST_SUM):
        for bit in range(0, 8 * (own / name).stat().st_size, FLIPPED):
            with flip(own / name, bit), pytest.raises(UserError, match=MANIFEST):
                Dataset.open(own)
    Dataset.open(own)


def test_the_sum_cannot_be_left_out(own: Path) -> None:
    (own / MANIFEST_SUM).unlink()
    refused(own, f"{MANIFEST_SUM} is missing")


def test_the_first_format_has_no_sum_and_is_read(own: Path) -> None:
    before = Dataset.open(own)
    as_first_format(own)
    after = Dataset.open(own)
    for name in ("train", "validation"):
        assert after.split(name).fingerprint == before.split(name).fingerprint
        read = [SampleReader(each.split(name)).read(0, each.split(name).documents) for each in (before, after)]
        assert [sample.tokens.tolist() for sample in read[0]] == [sample.tokens.tolist() for sample in read[1]]


def shard(content: Content, number: int = 0, split: str = "train") -> Content:
    found: Content = content["splits"][split]["shards"][number]
    return found


def moved(content: Content) -> None:
    shards = content["splits"]["train"]["shards"]
    shards[0], shards[1] = shards[1], shards[0]


def twice(content: Content) -> None:
    split = content["splits"]["train"]
    split["shards"].insert(1, split["shards"][0])
    for name in ("documents", "tokens"):
        split[name] += split["shards"][0][name]


def twice_renamed(content: Content) -> None:
    """The same shard under the next one's name, so that names, sums of numbers and order look right."""
    split = content["splits"]["train"]
    first, second = split["shards"][:2]
    for name in ("documents", "tokens"):
        split[name] += first[name] - second[name]
    split["shards"][1] = first | {"file": second["file"], "index": second["index"]}


CONTRADICTIONS: dict[str, tuple[Callable[[Content], Any], str]] = {
    "documents of a split": (lambda c: c["splits"]["train"].update(documents=7), "documents is 7, but its shards have"),
    "tokens of a split": (lambda c: c["splits"]["validation"].update(tokens=7), "tokens is 7, but its shards have"),
    "documents as text": (lambda c: c["splits"]["train"].update(documents="7"), r"splits\.train\.documents is \"7\", not an int"),
    "documents as truth": (lambda c: shard(c).update(documents=True), "documents is true, not an integer"),
    "documents null": (lambda c: shard(c).update(documents=None), "documents is null"),
    "a huge number": (lambda c: shard(c).update(bytes=10**40), "more than 64 bits"),
    "no tokens": (lambda c: shard(c).update(tokens=0), "documents with 0 tokens"),
    "a negative number": (lambda c: shard(c).update(documents=-1), "-1 documents"),
    "fewer bytes": (lambda c: shard(c).update(bytes=512), "cannot be 512 bytes"),
    "other bytes": (lambda c: shard(c).update(bytes=shard(c)["bytes"] + 512), r"is \d+ bytes; expected"),
    "a short sum": (lambda c: shard(c).update(sha256="ab"), "not a hexadecimal SHA-256"),
    "a sum in capitals": (lambda c: shard(c).update(sha256=shard(c)["sha256"].upper()), "not a hexadecimal SHA-256"),
    "another index's sum": (lambda c: shard(c).update(index_sha256="0" * 64), "not the one that was built"),
    "order": (moved, "shard 0 of train is train/train-000001.tar"),
    "a shard twice": (twice, "shard 1 of train is train/train-000000.tar"),
    "a shard twice, renamed": (twice_renamed, "the same sha256"),
    "vocabulary": (lambda c: c["tokenizer"].update(vocab_size=300), "vocab_size is 300, but tokenizer.json has 257 tokens"),
    "end token": (lambda c: c["tokenizer"].update(eos_id=5), "eos_id is 5, but '<|endoftext|>' is 256"),
    "end token's name": (lambda c: c["tokenizer"].update(eos_token="nothing"), "but 'nothing' is None"),
    "end outside": (lambda c: c["tokenizer"].update(eos_id=257), "eos_id 257 of 257 tokens"),
    "dtype": (lambda c: c.update(dtype="uint32"), "dtype is 'uint32'"),
    "no splits": (lambda c: c.update(splits={}), "splits are"),
    "another split": (lambda c: c["splits"].update(test=c["splits"]["train"]), "splits are"),
    "splits as a list": (lambda c: c.update(splits=[]), "splits is a list, not an object"),
    "settings": (lambda c: c["settings"].update(field="other"), "settings_sha256"),
    "a missing key": (lambda c: shard(c).pop("index_sha256"), r"shards\[0\]\.index_sha256 is missing"),
    "an unknown key": (lambda c: shard(c).update(more=1), r"shards\[0\]\.more is not a field"),
    "no tokenizer": (lambda c: c.pop("tokenizer"), "tokenizer is missing"),
    "another format": (lambda c: c.update(format="mtp_dist.dataset/9"), "has format 'mtp_dist.dataset/9'"),
    "the format as a list": (lambda c: c.update(format=[1]), "has format"),
    "counts": (lambda c: c["token_counts"].update(sha256="0" * 64), "token_counts.npy"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_sealed_manifest_that_contradicts_itself(own: Path, case: str) -> None:
    change, words = CONTRADICTIONS[case]
    reseal(own, change)
    refused(own, "dataset|shard", words)


@pytest.mark.parametrize("case", ["documents of a split", "vocabulary", "end token", "order", "a short sum"])
def test_the_first_format_is_held_to_the_same(own: Path, case: str) -> None:
    reseal(own, CONTRADICTIONS[case][0])
    as_first_format(own)
    refused(own, CONTRADICTIONS[case][1])


@pytest.mark.parametrize("name", ["../{}", "/etc/passwd", "train/../{}", "train\\{}", "./{}", "{}/", "", "a\0b", "train//{}"])
@pytest.mark.parametrize("field", ["file", "index"])
def test_names_lead_nowhere_else(own: Path, name: str, field: str) -> None:
    shutil.copy(own / "train/train-000000.tar", own.parent / "train-000000.tar")
    reseal(own, lambda content: shard(content).update({field: name.format("train-000000.tar")}))
    refused(own, MANIFEST, "not the name of a file inside")


@pytest.mark.parametrize("place", ["tokenizer", "token_counts"])
def test_names_of_other_files_lead_nowhere_else(own: Path, place: str) -> None:
    reseal(own, lambda content: content[place].update(file="../" + content[place]["file"]))
    refused(own, MANIFEST, "not the name of a file inside")


FILES = (MANIFEST, MANIFEST_SUM, "tokenizer.json", "train/train-000000.tar", "train/train-000000.index.npz", "token_counts.npy")


@pytest.mark.parametrize("file", FILES)
def test_links_do_not_leave_the_folder(own: Path, file: str) -> None:
    (own / file).rename(own.parent / "elsewhere")
    (own / file).symlink_to(own.parent / "elsewhere")
    if file in (MANIFEST, MANIFEST_SUM):  # nothing names these: they may be links, as the folder itself may
        Dataset.open(own)
    else:
        refused(own, f"{file} is a link out of")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_not_read(own: Path, file: str, kind: str) -> None:
    put(kind, own / file)
    refused(own, re.escape(Path(file).name))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b'{"format": NaN}', "NaN"),
        (b'{"format": 1, "format": 2}', "twice"),
        (b'{"format": "\\ud800"}', "surrogate"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_manifest_that_is_no_document(own: Path, content: bytes, words: str) -> None:
    write(own, content)
    refused(own, f"{MANIFEST} is damaged", words)


def test_a_manifest_without_end(own: Path) -> None:
    with (own / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    refused(own, MANIFEST, "bytes")


def rewritten(folder: Path, dtype: type, change: Callable[[list[np.ndarray]], Any]) -> None:
    """Validation's documents written anew, with sums and index that belong to them."""
    split = Dataset.open(folder).split("validation")
    documents = [sample.tokens.astype(dtype) for sample in SampleReader(split).read(0, split.documents)]
    change(documents)
    for shard in split.shards:
        shard.path.unlink()
    writer = SplitWriter(folder, "validation", 1 << 20, np.dtype(dtype))
    for tokens in documents:
        writer.add("name", tokens)
    record = writer.close()
    reseal(folder, lambda content: content["splits"].update(validation=json.loads(json.dumps(record, default=vars))))


@pytest.mark.parametrize(
    ("dtype", "change", "words"),
    [
        (np.uint16, lambda documents: documents[3].__setitem__(0, 257), "validation-000000003 has token 257, outside the voc"),
        (np.uint16, lambda documents: documents[4].__setitem__(-1, 7), "validation-000000004 ends with token 7"),
        (np.uint32, lambda documents: None, "stored as uint32; dataset.json says uint16"),
        (np.int16, lambda documents: None, "stored as int16"),
    ],
    ids=["outside", "no end", "wider", "signed"],
)
def test_tokens_are_compared_with_the_vocabulary(own: Path, dtype: type, change: Any, words: str) -> None:
    rewritten(own, dtype, change)
    assert Dataset.open(own).split("validation").documents
    with pytest.raises(ShardError, match=words):
        SampleReader(Dataset.open(own).split("validation")).read(0, 8)


def test_a_shard_of_another_place_is_noticed(own: Path) -> None:
    """Exchanged with sums, sizes and indexes: only its documents' numbers tell."""

    def exchange(content: Content) -> None:
        first, second = shard(content, 0), shard(content, 1)
        for key in first.keys() - {"file", "index"}:
            first[key], second[key] = second[key], first[key]

    for suffix in (".tar", ".index.npz"):
        first, second = (own / f"train/train-00000{number}{suffix}" for number in (0, 1))
        first.rename(own / "between")
        second.rename(first)
        (own / "between").rename(second)
    reseal(own, exchange)
    refused(own, "train-000000.tar", "for sample train-000000000")


INDEXES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "a gap": lambda arrays: arrays["offsets"].__setitem__(3, arrays["offsets"][3] + 512),
    "beyond the end": lambda arrays: arrays["sizes"].__setitem__(-1, 1 << 40),
    "negative": lambda arrays: arrays["sizes"].__setitem__(2, -512),
    "wrong dtype": lambda arrays: arrays.update(tokens=arrays["tokens"].astype(np.float64)),
    "two dimensions": lambda arrays: arrays.update(keys=arrays["keys"].reshape(1, -1)),
    "shorter": lambda arrays: arrays.update(checksums=arrays["checksums"][1:]),
    "missing": lambda arrays: arrays.pop("checksums"),
    "empty": lambda arrays: arrays.update({name: values[:0] for name, values in arrays.items()}),
    "other keys": lambda arrays: arrays["keys"].__setitem__(0, b"train-000000007"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_was_made_to_mislead(own: Path, case: str) -> None:
    path = own / "train/train-000000.index.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    INDEXES[case](arrays)
    np.savez(path, **arrays)
    reseal(own, lambda content: shard(content).update(index_sha256=file_sha256(path)))
    refused(own, "train-000000.tar is damaged", "index")


def test_an_index_that_unpacks_to_more_than_it_is(own: Path) -> None:
    path = own / "train/train-000000.index.npz"
    with np.load(path) as stored:
        np.savez_compressed(path, **dict(stored))
    reseal(own, lambda content: shard(content).update(index_sha256=file_sha256(path)))
    refused(own, "train-000000.tar is damaged", "compressed")


@pytest.mark.parametrize("counts", [np.zeros(3, np.int64), np.zeros(257, np.float32), np.full(257, -1), np.ones(257, np.int64)])
def test_counts_that_cannot_be_those_of_the_split(own: Path, counts: np.ndarray) -> None:
    np.save(own / token_counts.FILE, counts)
    reseal(own, lambda content: content["token_counts"].update(sha256=file_sha256(own / token_counts.FILE)))
    refused(own, token_counts.FILE)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        application("inspect", Inspection, run, argv=words, paths=("checkpoint", "other"))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err  # type: ignore[arg-type]


def test_inspect_says_what_is_in_a_dataset(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, str(own))
    assert status == 0
    train = Dataset.open(own).split("train")
    for part in (f"{train.documents} documents, {train.tokens:,} tokens", train.fingerprint, "257 tokens", "sound: every shard"):
        assert part in text
    for split in Dataset.open(own).splits.values():
        assert f" {len(split.shards)} shard{'' if len(split.shards) == 1 else 's'}, " in text
    with flip(own / "train/train-000001.tar", 8 * 1536 + 3):
        status, text = said(capsys, str(own))
        assert (status, "damaged: train/train-000001.tar" in text) == (1, True)
        assert said(capsys, str(own), "verify=false")[0] == 0
    with flip(own / MANIFEST, 999):
        status, text = said(capsys, str(own))
        assert (status, text.startswith("error: "), text.count("\n")) == (2, True, 1)
    assert said(capsys, str(own), str(own))[0] == 2
