"""Every source gives back the texts that it holds; bad input is one line that names the place."""

import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_dist.config.schema import TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.manifest import SPLITS
from mtp_dist.data.reading import SampleReader
from mtp_dist.data.sources.python_stdlib import PythonStdlib
from mtp_dist.data.sources.source import open_source, optional_package
from mtp_dist.data.tokenizer import load_tokenizer
from mtp_dist.errors import UserError
from tests.data.conftest import build_config


def stored_texts(dataset: Dataset) -> list[str]:
    """The text of every document of both splits, decoded from its tokens."""
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    texts = []
    for name in SPLITS:
        split = dataset.splits[name]
        for sample in SampleReader(split).read(0, split.documents):
            assert sample.tokens[-1] == dataset.eos_id
            assert (sample.tokens[:-1] != dataset.eos_id).all()
            texts.append(tokenizer.decode(sample.tokens[:-1].tolist(), skip_special_tokens=False))
    return sorted(texts)


def write_separated(folder: Path, texts: list[str]) -> Path:
    (folder / "all.txt").write_bytes("\n--8<--\n".join(texts).encode())
    return folder / "all.txt"


def write_jsonl(folder: Path, texts: list[str]) -> Path:
    (folder / "part.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts))
    return folder


def write_jsonl_gz(folder: Path, texts: list[str]) -> Path:
    with gzip.open(folder / "part.jsonl.gz", "wt") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n\n")
    return folder / "*.gz"


def write_parquet(folder: Path, texts: list[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, folder / "part.parquet", row_group_size=50)
    return folder


def write_hf(folder: Path, texts: list[str]) -> Path:
    import datasets

    datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))}).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = {
    "jsonl": (write_jsonl, "jsonl", {}),
    "jsonl.gz": (write_jsonl_gz, "jsonl", {}),
    "parquet": (write_parquet, "parquet", {}),
    "hf": (write_hf, "hf", {}),
    "separated text": (write_separated, "text", {"separator": "\n--8<--\n"}),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_texts_come_back(texts: dict[str, str], tmp_path: Path, kind: str, tokenizer: str) -> None:
    write: Callable[[Path, list[str]], Path]
    write, source, settings = WRITERS[kind]
    (tmp_path / "in").mkdir()
    place = write(tmp_path / "in", list(texts.values()))
    chosen = TokenizerConfig(kind=tokenizer) if tokenizer == "bytes" else TokenizerConfig(vocab_size=400)
    config = build_config(tmp_path / "out", source=source, input=[str(place)], tokenizer=chosen, **settings)
    assert stored_texts(build(config)[0]) == sorted(texts.values())


def test_text_files_come_back(dataset: Dataset, texts: dict[str, str]) -> None:
    assert stored_texts(dataset) == sorted(texts.values())


def test_inputs_may_be_files_folders_and_patterns(texts_folder: Path, tmp_path: Path) -> None:
    """A file that several inputs name is read once; names do not depend on where the folder lies."""
    config = build_config(tmp_path, source="text", input=[str(texts_folder / "a"), str(texts_folder / "**/*.txt")])
    documents = list(open_source(config))
    assert len(documents) == len(list(texts_folder.rglob("*.txt")))
    assert sum("/" in document.name for document in documents) == len(documents) - len(list(texts_folder.glob("a/*")))
    assert not any(str(texts_folder) in document.name for document in documents)


def test_the_standard_library_is_a_source() -> None:
    documents = {document.name: document.text for document in PythonStdlib()}
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("os.py", "json/decoder.py"):
        assert documents[name] == (root / name).read_text(encoding="utf-8")
    assert not any("site-packages" in name or "__pycache__" in name for name in documents)
    assert list(documents) == [document.name for document in PythonStdlib()]


def test_the_standard_library_leaves_out_what_does_not_decode(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "wrong.py").write_bytes(b"# -*- coding: no-such-codec -*-\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("pass\n")
    assert [(document.name, document.text.splitlines()[1]) for document in PythonStdlib(tmp_path)] == [("good.py", "name = 'é'")]


@pytest.mark.parametrize(
    ("source", "file", "content", "named"),
    [
        ("text", "a.txt", b"good\xff", r"a\.txt is not UTF-8 \(byte 4\)"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not valid JSON"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl line 3 is not a JSON object"),
        ("jsonl", "a.jsonl", b'{"body": "x"}\n', r"field=text is not in .*a\.jsonl line 1; it has body"),
        ("jsonl", "a.jsonl", b'{"text": null}\n', r"a\.jsonl line 1: field 'text' holds nothing"),
        ("jsonl", "a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl line 1: field 'text' holds half of a surrogate pair"),
        ("jsonl", "a.jsonl", b"\xff\n", r"a\.jsonl line 1 is not UTF-8 \(byte 0 of the line\)"),
        ("jsonl", "a.jsonl.gz", b"plain", r"a\.jsonl\.gz is not a whole gzip file"),
        ("jsonl", "a.txt", b"{}", r"input=.* matches no file ending in \.jsonl or \.jsonl\.gz"),
        ("parquet", "a.parquet", b"PAR0", r"Parquet file .*a\.parquet cannot be read \(ArrowInvalid"),
        ("hf", "a.txt", b"x", r"input=.* is not a folder written by datasets' save_to_disk"),
        ("text", "a.txt", b"", "source=text has no documents with text"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, source: str, file: str, content: bytes, named: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_bytes(content)
    with pytest.raises(UserError, match=named) as caught:
        build(build_config(tmp_path / "out", source=source, input=[str(tmp_path / "in")]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hf"])
def test_missing_input_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=rf"source={source} needs input="):
        build(build_config(tmp_path / "out", source=source))
    with pytest.raises(UserError, match=r"input=.*nowhere"):
        build(build_config(tmp_path / "out", source=source, input=[str(tmp_path / "nowhere")]))


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    for write, source in ((write_parquet, "parquet"), (write_hf, "hf")):
        place = write(tmp_path, ["one", "two"])
        with pytest.raises(UserError, match=r"field=body is not in .*; it has (n, text|text, n)"):
            build(build_config(tmp_path / "out", source=source, input=[str(place)], field="body"))


def test_a_missing_package_comes_with_its_command() -> None:
    with pytest.raises(UserError, match=r"source=parquet needs .*: pip install no_such_package"):
        optional_package("no_such_package", "parquet")


def test_several_hf_splits_must_be_named(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"several splits; name those to read: .*saved/train, .*saved/test"):
        build(build_config(tmp_path / "out", source="hf", input=[str(tmp_path / "saved")]))
