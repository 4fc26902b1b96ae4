"""No setting of a build is without effect, and nothing that stands in its way is waited for or written through."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.config.schema import TokenizerConfig
from mtp_dist.data import building
from mtp_dist.data.build_settings import check_settings
from mtp_dist.data.building import build
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.data.workspace import MARKER
from mtp_dist.errors import UserError
from tests.data.conftest import build_config
from tests.data.test_command import command

BYTES, FILE = TokenizerConfig(kind="bytes"), TokenizerConfig(kind="file", path="mine.json")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"source": "python_stdlib", "input": ["x"]}, r"input=\[x\] has no effect with source=python_stdlib; add source=text"),
        ({"source": "text", "field": "body"}, "field=body has no effect with source=text; it is for source=jsonl, parquet, hf"),
        ({"source": "python_stdlib", "field": "body"}, "field=body has no effect with source=python_stdlib"),
        *(
            ({"source": name, "separator": "--"}, f"separator=-- has no effect with source={name}")
            for name in ("jsonl", "parquet", "hf")
        ),
        (
            {"tokenizer": TokenizerConfig(path="mine.json")},
            r"tokenizer\.path=mine\.json has no effect with .*bpe; add tokenizer=file",
        ),
        (
            {"tokenizer": TokenizerConfig("bytes", "mine.json")},
            r"tokenizer\.path=mine\.json has no effect with tokenizer\.kind=bytes",
        ),
        ({"tokenizer": TokenizerConfig(eos_token="</s>")}, r"tokenizer\.eos_token=</s> has no effect with tokenizer\.kind=bpe"),
        (
            {"tokenizer": TokenizerConfig("bytes", vocab_size=300)},
            r"tokenizer\.vocab_size=300 has no effect with .*bytes, which is not",
        ),
        ({"tokenizer": TokenizerConfig("file", "mine.json", vocab_size=300)}, r"tokenizer\.vocab_size=300 has no effect"),
        ({"tokenizer": TokenizerConfig("file", "mine.json", train_bytes=9)}, r"tokenizer\.train_bytes=9 has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        build(build_config(tmp_path / "out", **settings))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("tokenizer.vocab_size", {"tokenizer": BYTES}),
        ("tokenizer.train_bytes", {"tokenizer": FILE}),
        ("field", {"source": "text"}),
        ("separator", {"source": "jsonl"}),
        ("input", {"source": "python_stdlib"}),
    ],
)
def test_also_where_it_equals_the_default(tmp_path: Path, typed: str, settings: dict[str, Any]) -> None:
    config = build_config(tmp_path / "out", **settings)
    check_settings(config)
    check_settings(config, {"out", "source", "tokenizer"})
    with pytest.raises(UserError, match=f"{typed}=.* has no effect"):
        check_settings(config, {typed})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tokenizer.path=mine.json"], "tokenizer.path=mine.json has no effect with tokenizer.kind=bpe; add tokenizer=file"),
        (["tokenizer=bytes", "tokenizer.vocab_size=4096"], "tokenizer.vocab_size=4096 has no effect with tokenizer.kind=bytes"),
        (["source=text", "input=[x]", "field=text"], "field=text has no effect with source=text"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = command(f"out={tmp_path / 'out'}", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["field", "separator", "tokenizer.eos_token"])
def test_half_characters_in_settings_are_refused(tmp_path: Path, key: str) -> None:
    config = build_config(tmp_path / "out", source="text", input=["x"], tokenizer=FILE)
    name = key.split(".")[-1]
    setattr(config.tokenizer if "." in key else config, name, "\udcff")
    with pytest.raises(UserError, match=f"{key} holds bytes that are not UTF-8"):
        build(config)
    FILE.eos_token = ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["a FIFO", "a device", "a folder"])
def test_a_tokenizer_that_is_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "mine.json"
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{path}.* is {what}, not a regular file"):
        build(build_config(tmp_path / "out", tokenizer=TokenizerConfig("file", str(path))))


def test_a_tokenizer_that_is_damaged_anywhere(tmp_path: Path) -> None:
    content = byte_tokenizer().to_str()
    path = tmp_path / "mine.json"
    config = build_config(tmp_path / "out", tokenizer=TokenizerConfig("file", str(path)))
    for damaged in ("", "[" * 100_000, content[: len(content) // 2], content.replace('"version"', '"versio"'), "\0", "null"):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"mine\.json is not a tokenizers JSON") as caught:
            build(config)
        assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["out", "out/dataset.json", "out.building", "out.building/UNFINISHED"])
@pytest.mark.parametrize("what", ["FIFO", "device", "link to a file", "link to a folder"])
def test_what_stands_in_the_way_is_named_and_left_alone(tmp_path: Path, texts_folder: Path, place: str, what: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    target = tmp_path / place
    target.parent.mkdir(exist_ok=True)
    if what == "FIFO":
        os.mkfifo(target)
    else:
        target.symlink_to({"device": "/dev/zero", "link to a file": mine / "thesis", "link to a folder": mine}[what])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"is not a dataset|was not made by a build|is a |is damaged") as caught:
        build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)]))
    assert str(tmp_path / "out") in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (mine / "thesis").read_text() == "mine"


def test_what_a_build_left_is_removed_but_not_what_it_links_to(tmp_path: Path, texts_folder: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out.building" / MARKER).touch()
    (tmp_path / "out.building" / "train").symlink_to(tmp_path / "mine")
    build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)]))
    assert (tmp_path / "mine" / "thesis").read_text() == "mine"


@pytest.mark.parametrize("out", ["/", "/proc/out", "/dev/null", "/dev/null/out", "x" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_a_place_where_no_dataset_can_be_made(texts_folder: Path, out: str) -> None:
    config = build_config(Path("x"), source="text", input=[str(texts_folder)])
    config.out = out
    with pytest.raises(UserError, match=r"^out=") as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_while_shards_are_written(
    tmp_path: Path, texts_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed, and the cause is said once."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(building.SplitWriter, "add", full)
    with pytest.raises(UserError, match=rf"out={tmp_path}/out cannot be written: No space left"):
        build(build_config(tmp_path / "out", source="text", input=[str(texts_folder)]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "../here", "x/.."])
def test_the_current_folder_is_not_replaced(
    tmp_path: Path, texts_folder: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """The shell in it would stand in a folder that is no more."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = build_config(Path("x"), source="text", input=[str(texts_folder)])
    config.out = out
    with pytest.raises(UserError, match=f"out={out} is the current folder"):
        build(config)
