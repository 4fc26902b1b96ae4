"""Whatever is wrong with an input, the build ends with one line that names the file and the place, and leaves nothing behind."""

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.data.building import build
from mtp_dist.data.sources import source as source_module
from mtp_dist.data.sources import text as text_module
from mtp_dist.data.sources.hf import SavedDatasets
from mtp_dist.data.sources.jsonl import JsonLines
from mtp_dist.data.sources.parquet import ParquetFiles
from mtp_dist.data.sources.source import Source, open_source
from mtp_dist.data.sources.text import TextFiles
from mtp_dist.errors import UserError
from tests.data.conftest import build_config

TEXTS = [f"row {number * 7919 % 1000} λ" * 5 for number in range(800)]


def saved_dataset(folder: Path, shards: int = 2) -> Path:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    table.save_to_disk(folder / "saved", num_shards=shards)
    return folder / "saved"


def write_jsonl(path: Path) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path) -> Path:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=300, write_page_checksum=True)
    return path


OPENERS: dict[str, Callable[[str], Source]] = {
    "jsonl.gz": lambda place: JsonLines([place], "text"),
    "parquet": lambda place: ParquetFiles([place], "text"),
    "hf": lambda place: SavedDatasets([place], "text"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Kind of source -> what it is given, and the file to damage."""
    folder = tmp_path_factory.mktemp("sound")
    packed, table = write_jsonl(folder / "x.jsonl.gz"), write_parquet(folder / "x.parquet")
    saved = saved_dataset(folder, shards=1)
    return {"jsonl.gz": (packed, packed), "parquet": (table, table), "hf": (saved, next(saved.glob("*.arrow")))}


def damages(content: bytes, draw: random.Random) -> Iterator[bytes]:
    for _ in range(12):
        place = draw.randrange(len(content))
        yield content[:place]
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        yield content[:place] + b"\xff" * min(16, len(content) - place) + content[place + 16 :]
        yield content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]


@pytest.mark.parametrize("kind", list(OPENERS))
def test_damage_anywhere_is_one_line_or_does_no_harm(sound: dict[str, tuple[Path, Path]], kind: str) -> None:
    place, file = sound[kind]
    content, said = file.read_bytes(), []
    try:
        for damaged in damages(content, random.Random(kind)):
            file.write_bytes(damaged)
            try:
                opened = OPENERS[kind](str(place))
                assert opened.size() > 0
                assert len(list(opened)) == len(TEXTS)
            except UserError as error:
                said.append(str(error))
    finally:
        file.write_bytes(content)
    assert all(file.name in line and "\n" not in line for line in said)
    assert len(said) > 20  # Arrow has no checksum: a flipped letter is a letter
    assert [document.text for document in OPENERS[kind](str(place))] == TEXTS


def refusal(folder: Path, source: str, place: object, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        build(build_config(folder / "out", source=source, input=[str(place)], **settings))
    assert not (folder / "out").exists() and not (folder / "out.building").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_arrow_stream_cut_between_two_batches_is_not_a_shorter_one(tmp_path: Path) -> None:
    """pyarrow and datasets take it for one."""
    (tmp_path / "saved").mkdir()
    with pyarrow.OSFile(str(tmp_path / "saved" / "data.arrow"), "wb") as sink:
        writer = pyarrow.ipc.new_stream(sink, pyarrow.schema([("text", pyarrow.string())]))
        for number in range(2):
            writer.write_batch(pyarrow.record_batch({"text": [f"batch {number}"]}))
            end = sink.tell()
        writer.close()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    source = SavedDatasets([str(tmp_path / "saved")], "text")
    assert [document.text for document in source] == ["batch 0", "batch 1"]
    os.truncate(tmp_path / "saved" / "data.arrow", end)
    assert "data.arrow is cut off" in refusal(tmp_path, "hf", tmp_path / "saved")


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "pandas", None])
@pytest.mark.parametrize("columns", [["id"], ["text"], None])
def test_the_format_of_a_saved_dataset_does_not_matter(tmp_path: Path, form: str | None, columns: list[str] | None) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["one", "two", "three"]})
    table.set_format(form, columns=columns)
    table.save_to_disk(tmp_path / "saved")
    source = SavedDatasets([str(tmp_path / "saved")], "text")
    assert [tuple(document) for document in source] == [("saved#0", "one"), ("saved#1", "two"), ("saved#2", "three")]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (b"", r"cannot be read \(JSONDecodeError"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[]", "cannot be read"),
        (b"{}", "cannot be read"),
        (b'{"_data_files": [{"filename": "../x.arrow"}]}', r"names the file '\.\./x\.arrow', which is not in the folder"),
        (b'{"_data_files": [{"filename": "/dev/zero"}]}', r"names the file '/dev/zero', which is not in the folder"),
        (b'{"_data_files": [{"filename": "link"}]}', r"link \(a link to /dev/zero\) is a device, not a regular file"),
        (b'{"_data_files": [{"filename": "pipe"}]}', "pipe is a FIFO, not a regular file"),
        (b'{"_data_files": [{"filename": "empty"}]}', "empty is cut off"),
        (b'{"_data_files": [{"filename": "gone"}]}', r"gone cannot be read \(FileNotFoundError: No such file"),
        (b'{"_data_files": [{"filename": ""}]}', "is a folder, not a regular file"),
        (b'{"_data_files": [], "_indices_data_files": [{"filename": "x"}]}', "a selection of rows"),
        (b'{"_data_files": []}', "has no documents with text"),
    ],
)
@pytest.mark.timeout(60)
def test_a_hostile_state_is_named(tmp_path: Path, state: bytes, named: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_bytes(state)
    (folder / "link").symlink_to("/dev/zero")
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    assert re.search(named, refusal(tmp_path, "hf", folder))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_fifo_for_a_description(tmp_path: Path, name: str) -> None:
    (tmp_path / "saved").mkdir()
    os.mkfifo(tmp_path / "saved" / name)
    assert f"{name} is a FIFO" in refusal(tmp_path, "hf", tmp_path / "saved")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "x.jsonl line 2 is nested too deeply"),
        (b'{"text": "caf\xe9"}', "x.jsonl line 2 is not UTF-8 (byte 13 of the line)"),
        (b'{"text": "\xed\xa0\x80"}', "x.jsonl line 2 is not UTF-8"),
        (b'{"text": 5}', "x.jsonl line 2: field 'text' holds a number, not text"),
        (b'{"text": ["a"]}', "x.jsonl line 2: field 'text' holds list, not text"),
        (b'"text"', "x.jsonl line 2 is not a JSON object"),
        ('{"text": "a"}'.encode("utf-16"), "x.jsonl line 2 is not UTF-8"),
        (b'{"text": "\0"}', "x.jsonl line 2 is not valid JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "x.jsonl line 2 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, named: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    assert named in refusal(tmp_path, "jsonl", tmp_path / "x.jsonl")


def test_sound_lines_are_read(tmp_path: Path) -> None:
    """A byte order mark at the beginning, integers of any length in other fields, NULs that JSON spells out."""
    lines = [
        '\ufeff{"text": "one"}',
        '{"n": ' + "7" * 5000 + ', "text": "two"}',
        r'{"text": "three\u0000"}',
        "",
        ' {"text": "four"}\r',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    documents = list(JsonLines([str(tmp_path / "x.jsonl")], "text"))
    assert [document.text for document in documents] == ["one", "two", "three\0", "four"]
    assert [document.name for document in documents] == ["x.jsonl#1", "x.jsonl#2", "x.jsonl#3", "x.jsonl#5"]


def test_an_empty_gzip_file_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").touch()
    assert "x.jsonl.gz is not a whole gzip file (after line 0: it is empty)" in refusal(tmp_path, "jsonl", tmp_path)


def test_a_line_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MiB on the disk for a gigabyte would take too long here: the limit is lowered, not the ratio."""
    from mtp_dist.data.sources import jsonl

    monkeypatch.setattr(jsonl, "DOCUMENT_LIMIT", 10_000)
    monkeypatch.setattr(source_module, "DOCUMENT_LIMIT", 10_000)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "' + b"a" * 5_000_000)
    assert "x.jsonl.gz line 2 is longer than" in refusal(tmp_path, "jsonl", tmp_path)


def test_a_file_that_is_too_long_for_a_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "DOCUMENT_LIMIT", 8 * 2**20)
    with (tmp_path / "x.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole: only as much is read as a document may be
    said = refusal_of_reading(lambda: list(TextFiles([str(tmp_path / "x.txt")], "")))
    assert "x.txt (set separator= if it holds several documents) is longer than 8 MiB" in said
    said = refusal_of_reading(lambda: list(TextFiles([str(tmp_path / "x.txt")], "\n\n")))
    assert "a document of" in said and "x.txt is longer than 8 MiB" in said


def refusal_of_reading(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@given(
    pieces=st.lists(st.text(alphabet="ab-λ🙂", max_size=9), min_size=1, max_size=9),
    separator=st.sampled_from(["-", "a", "aa", "-a-", "λ"]),
)
@settings(max_examples=150, deadline=None)
def test_text_is_divided_as_by_split(tmp_path_factory: pytest.TempPathFactory, pieces: list[str], separator: str) -> None:
    """However the file's bytes fall into chunks: inside characters, inside separators."""
    folder = tmp_path_factory.mktemp("pieces")
    text = separator.join(pieces)
    (folder / "x").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        for chunk in (1, 2, 3, 7):
            patch.setattr(text_module, "CHUNK", chunk)
            assert [document.text for document in TextFiles([str(folder / "x")], separator)] == text.split(separator)
            assert [document.text for document in TextFiles([str(folder / "x")], "")] == [text]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfeh\0i\0", "x.txt is not UTF-8 (byte 0)"),
        (b"a" * 2_000_000 + b"\xce", "x.txt is not UTF-8 (byte 2000000)"),
        (b"a" * (2**20 - 1) + "λ".encode()[:1] + b"a" * 9, "x.txt is not UTF-8 (byte 1048575)"),
        (b"\xef\xbb\xbf", "has no documents with text"),
        (b"", "has no documents with text"),
    ],
)
@pytest.mark.parametrize("separator", ["", "--"])
def test_text_that_is_not_utf_8_is_named_by_its_byte(tmp_path: Path, content: bytes, named: str, separator: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert named in refusal(tmp_path, "text", tmp_path / "x.txt", separator=separator)


def test_a_byte_order_mark_is_no_text_and_a_nul_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\0\xef\xbb\xbf\r\n")
    assert [document.text for document in TextFiles([str(tmp_path / "x.txt")], "")] == ["one\0\ufeff\r\n"]


def test_parquet_text_that_is_not_utf_8(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "x.parquet")
    assert "x.parquet cannot be read (ArrowInvalid: Invalid UTF8" in refusal(tmp_path, "parquet", tmp_path)


@pytest.mark.parametrize("values", [pyarrow.array([b"a"]), pyarrow.array([1.5]), pyarrow.array([["a"]])])
def test_parquet_columns_that_are_not_text(tmp_path: Path, values: pyarrow.Array) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    assert "x.parquet row 0: field 'text' holds" in refusal(tmp_path, "parquet", tmp_path)


def test_a_file_that_goes_while_the_input_is_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    reading = iter(open_source(build_config(tmp_path / "out", source="text", input=[str(tmp_path)])))
    next(reading)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt cannot be read \(FileNotFoundError: No such file or directory\)"):
        next(reading)
