"""A build is deterministic, complete or absent, never overwritten, and keeps validation text out of training."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.schema import ShardBuild, TokenizerConfig
from mtp_dist.data.building import build, split_of
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.index import ShardIndex
from mtp_dist.data.manifest import SPLITS
from mtp_dist.data.reading import load_index
from mtp_dist.data.tokenizer import byte_tokenizer, train_bpe
from mtp_dist.data.workspace import MARKER, building_folder, check_free
from mtp_dist.errors import UserError
from tests.data.conftest import build_config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(dataset: Dataset, split: str) -> list[str]:
    """Source names of a split's documents, read with nothing but tarfile."""
    found = []
    for shard in dataset.splits[split].shards:
        with tarfile.open(shard.path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found.append(json.load(io.BytesIO(tar.extractfile(member).read()))["name"])  # type: ignore[union-attr]
    return found


def test_tar_headers_hold_no_clock_and_no_user(dataset: Dataset) -> None:
    for split in dataset.splits.values():
        for shard in split.shards:
            with tarfile.open(shard.path) as tar:
                for member in tar:
                    assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_same_build_gives_the_same_bytes(texts_folder: Path, tmp_path: Path, kind: str) -> None:
    folders = []
    for name in ("one", "two"):
        tokenizer = TokenizerConfig(kind=kind, vocab_size=400) if kind == "bpe" else TokenizerConfig(kind=kind)
        config = build_config(tmp_path / name, source="text", input=[str(texts_folder)], tokenizer=tokenizer)
        folders.append(contents(build(config)[0].path))
    assert folders[0] == folders[1]
    assert sum(name.endswith(".tar") for name in folders[0]) > 3


def test_the_manifest_counts_what_is_there(dataset: Dataset, texts: dict[str, str]) -> None:
    assert set(dataset.splits) == set(SPLITS)
    assert sum(split.documents for split in dataset.splits.values()) == len(texts)
    assert sum(split.tokens for split in dataset.splits.values()) == sum(len(text.encode()) + 1 for text in texts.values())
    for split in dataset.splits.values():
        assert len(split.shards) > 1
        assert split.documents == sum(shard.documents for shard in split.shards)
        assert split.tokens == sum(shard.tokens for shard in split.shards)


def test_the_index_is_that_of_the_tar(dataset: Dataset) -> None:
    for split in dataset.splits.values():
        for shard in split.shards:
            stored, scanned = load_index(shard), ShardIndex.scan(shard.path)
            for item in dataclasses.fields(ShardIndex):
                assert (getattr(stored, item.name) == getattr(scanned, item.name)).all()


def test_validation_is_disjoint_and_chosen_by_name(dataset: Dataset, texts: dict[str, str]) -> None:
    train, validation = names(dataset, "train"), names(dataset, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert all(split_of(name, 0.2) == "validation" for name in validation)
    assert all(split_of(name, 0.2) == "train" for name in train)


def test_a_larger_validation_share_keeps_the_smaller_one() -> None:
    paths = [f"folder/file-{number}.py" for number in range(4000)]
    small = {path for path in paths if split_of(path, 0.05) == "validation"}
    large = {path for path in paths if split_of(path, 0.10) == "validation"}
    assert small < large
    assert 0.03 < len(small) / len(paths) < 0.07
    assert not any(split_of(path, 0.0) == "validation" for path in paths)


def test_a_bpe_learns_from_the_training_split_only(texts_folder: Path, texts: dict[str, str], tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=400)
    dataset, _ = build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)], tokenizer=tokenizer))
    expected = train_bpe((texts[name] for name in names(dataset, "train")), 400)
    assert dataset.tokenizer_path.read_text() == expected.to_str(pretty=True)
    assert expected.to_str() != train_bpe(texts.values(), 400).to_str()


def test_documents_are_stored_in_the_source_s_order(dataset: Dataset, texts: dict[str, str]) -> None:
    for split in SPLITS:
        assert names(dataset, split) == sorted(names(dataset, split))


def test_a_complete_dataset_is_left_alone(texts_folder: Path, tmp_path: Path) -> None:
    config = build_config(tmp_path / "out", source="text", input=[str(texts_folder)])
    assert build(config)[1]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert not build(config)[1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"validation_share": 0.3}, "validation_share"),
        ({"tokenizer": TokenizerConfig(kind="bpe")}, "tokenizer"),
        ({"shard_mb": 1.0, "separator": "x"}, "separator, shard_mb"),
    ],
)
def test_another_dataset_is_not_overwritten(texts_folder: Path, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    settings: dict[str, Any] = {"source": "text", "input": [str(texts_folder)]}
    build(build_config(tmp_path / "out", **settings))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=rf"other settings \({named}\); choose another out="):
        build(build_config(tmp_path / "out", **settings, **changes))
    assert contents(tmp_path / "out") == before


def test_a_foreign_folder_is_not_touched(texts_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists and is not a dataset"):
        build(build_config(texts_folder, source="text", input=[str(texts_folder)]))
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out.building" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by a build"):
        build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)]))
    assert (tmp_path / "out.building" / "thesis.txt").read_text() == "mine"


def test_a_killed_build_starts_afresh(texts_folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of writing: no dataset, and the next build gives what an undisturbed one gives."""
    program = (
        "import sys; from pathlib import Path; from mtp_dist.data.building import build;"
        "from tests.data.conftest import build_config;"
        "build(build_config(Path(sys.argv[1]), source='python_stdlib', shard_mb=0.05))"
    )
    out, building = tmp_path / "out", tmp_path / "out.building"
    process = subprocess.Popen([sys.executable, "-c", program, str(out)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not list(building.glob("train/*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(building.glob("train/*.tar"))
    with pytest.raises(UserError, match="not a dataset"):
        Dataset.open(out)
    settings: dict[str, Any] = {"source": "text", "input": [str(texts_folder)]}
    assert build(build_config(out, **settings))[1]
    assert not building.exists()
    assert contents(out) == contents(build(build_config(tmp_path / "undisturbed", **settings))[0].path)


def test_two_builds_do_not_mix(texts_folder: Path, tmp_path: Path) -> None:
    config = build_config(tmp_path / "out", source="text", input=[str(texts_folder)])
    with building_folder(tmp_path / "out"), pytest.raises(UserError, match="another build is writing"):
        build(config)
    assert not (tmp_path / "out" / MARKER).exists()


def test_a_full_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs about 1099511627776 MiB.*limit_mb"):
        check_free(tmp_path / "not" / "yet" / "there", 2**60)


def test_limit_stops_after_so_much_text(texts_folder: Path, texts: dict[str, str], tmp_path: Path) -> None:
    limit = 0.01
    dataset, _ = build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)], limit_mb=limit))
    used = names(dataset, "train") + names(dataset, "validation")
    sizes = [len(texts[name].encode()) for name in sorted(used)]
    assert sum(sizes[:-1]) < limit * 2**20 <= sum(sizes)


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in {"a": "", "b": "text", "c": ""}.items():
        (tmp_path / "in" / name).write_text(text)
    dataset, _ = build(build_config(tmp_path / "out", source="text", input=[str(tmp_path / "in")], validation_share=0.0))
    assert names(dataset, "train") == ["b"]
    with pytest.raises(UserError, match=r"no documents in split 'validation'.*validation_share"):
        dataset.split("validation")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source": "web"}, "source=web is unknown; choose python_stdlib, text, jsonl, parquet, hf"),
        ({"validation_share": 1.0}, r"validation_share=1\.0"),
        ({"shard_mb": 0.0}, r"shard_mb=0\.0"),
        ({"limit_mb": -1.0}, r"limit_mb=-1\.0"),
        ({"workers": -1}, "workers=-1"),
        ({"tokenizer": TokenizerConfig(kind="words")}, "tokenizer.kind=words"),
        ({"tokenizer": TokenizerConfig(kind="bpe", vocab_size=200)}, r"tokenizer\.vocab_size=200.*257"),
        ({"tokenizer": TokenizerConfig(kind="file")}, r"tokenizer\.path"),
        ({"tokenizer": TokenizerConfig(kind="file", path="nowhere.json")}, r"nowhere\.json does not exist"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        build(build_config(tmp_path / "out", **{"source": "python_stdlib", "limit_mb": 0.1, **changes}))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_out_is_named() -> None:
    with pytest.raises(UserError, match="out is empty"):
        build(ShardBuild())


def test_a_tokenizer_file_is_used_as_it_is(texts_folder: Path, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "mine.json"))
    settings = {"source": "text", "input": [str(texts_folder)], "tokenizer": TokenizerConfig("file", str(tmp_path / "mine.json"))}
    dataset, _ = build(build_config(tmp_path / "out", **settings))
    assert (dataset.vocab_size, dataset.eos_id, dataset.eos_token) == (257, 256, "<|endoftext|>")
    assert not build(build_config(tmp_path / "out", **settings))[1]
