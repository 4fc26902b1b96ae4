"""Which files an input covers and what they are called: by the input and the file alone, and nothing is passed over silently."""

import os
import subprocess
from pathlib import Path

import pytest

from mtp_dist.data.building import build
from mtp_dist.data.sources.files import find_files
from mtp_dist.data.sources.python_stdlib import PythonStdlib
from mtp_dist.data.sources.source import open_source
from mtp_dist.data.sources.unread import Unread
from mtp_dist.errors import UserError
from tests.data.conftest import build_config
from tests.data.test_command import command

JSONL = (".jsonl", ".jsonl.gz")


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(*inputs: object, suffixes: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Name -> the content of the file, which is the name under which `write` made it."""
    files = find_files([str(entry) for entry in inputs], "text", Unread(), suffixes)
    assert len({file.name for file in files}) == len(files)
    return {file.name: file.path.read_text() for file in files}


def left(*inputs: object, suffixes: tuple[str, ...] = ("",)) -> str:
    unread = Unread()
    find_files([str(entry) for entry in inputs], "text", unread, suffixes)
    return "\n".join(unread.lines())


PATTERNS = ["", "*", "*/*", "**", "**/*.jsonl", "*/x.jsonl", "a/*", "a/x.jsonl", "[ab]/*.jsonl", "**/a/**", "*/../a/x.jsonl"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("more", ["a/y.jsonl", "b/x.jsonl", "a.jsonl", "a/a/x.jsonl", "link", "folder link", "c/deep/er/x.jsonl"])
def test_a_name_does_not_depend_on_other_files(tmp_path: Path, pattern: str, more: str) -> None:
    root = write(tmp_path / "crawl", "a/x.jsonl", "z.jsonl")
    before = found(root / pattern)
    if more == "link":
        (root / "0.jsonl").symlink_to("a/x.jsonl")
    elif more == "folder link":
        (root / "0").symlink_to("a")
    else:
        write(root, more)
    after = found(root / pattern)
    assert after.items() >= before.items()
    # A link below the root adds what it leads to, under that file's own name.
    assert set(after) - set(before) <= ({"a/x.jsonl"} if "link" in more else {more, more.removeprefix("a/")})


def test_names_begin_after_the_fixed_part_of_a_pattern(tmp_path: Path) -> None:
    root = write(tmp_path / "crawl", "a/x.jsonl")
    assert set(found(root / "*" / "*.jsonl")) == {"a/x.jsonl"}
    assert set(found(root / "a" / "*.jsonl")) == {"x.jsonl"}
    assert set(found(root / "**")) == set(found(root)) == {"a/x.jsonl"}
    assert set(found(root / "a" / "x.jsonl")) == {"x.jsonl"}


def test_the_first_input_that_covers_a_file_names_it(tmp_path: Path) -> None:
    root = write(tmp_path / "crawl", "a/x", "b/x")
    assert found(root / "a", root) == {"x": "a/x", "b/x": "b/x"}
    assert found(root, root / "a") == {"a/x": "a/x", "b/x": "b/x"}


def test_a_link_out_of_the_folder_is_a_file_of_its_own(tmp_path: Path) -> None:
    """As in folders whose names are links into a store, in which two may lead to the same bytes."""
    root = write(tmp_path / "snapshot", "real")
    write(tmp_path, "blob")
    (root / "b").symlink_to("../blob")
    before = found(root)
    (root / "a").symlink_to("../blob")
    assert found(root) == before | {"a": "blob"} == {"real": "real", "b": "blob", "a": "blob"}


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    root = write(tmp_path / "crawl", "a/x")
    for name in ("one", "two", "three"):
        (root / "a" / name).symlink_to("..")
    for entry in (root, root / "**", root / "**" / "*", root / "**" / "x", root / "**" / "**" / "x"):
        assert found(entry) == {"a/x": "a/x"}
    assert "3 links to folders" in left(root)
    assert "3 links to folders" in left(root / "**" / "x")


def test_a_tree_deeper_than_the_stack(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=handle)
            below = os.open("d", os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = below
        os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    finally:
        os.close(handle)
    (name,) = found(tmp_path)
    assert name == "d/" * 1200 + "x"
    assert set(found(tmp_path / "**" / "x")) == {name}
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)


def test_what_is_covered_and_not_read_is_named(tmp_path: Path) -> None:
    others = (f"{number}.txt" for number in range(9))
    root = write(tmp_path / "crawl", "a.jsonl", "notes/README.md", ".hidden.jsonl", ".git/x.jsonl", *others)
    write(tmp_path, "other/x.jsonl")
    (root / "linked").symlink_to("../other")
    said = left(root, suffixes=JSONL).splitlines()
    assert f"not read: 2 hidden files and folders: {root}/.git, {root}/.hidden.jsonl" in said
    assert f"not read: 1 links to folders: {root}/linked" in said
    first = f"{root}/0.txt, {root}/1.txt, {root}/2.txt"
    assert f"not read: 10 files that do not end in .jsonl or .jsonl.gz: {first} and 7 more" in said
    assert len(said) == 3
    assert f"1 folders that a pattern matches (for the files in them, write FOLDER/*): {root}/notes" in left(root / "[an]*")
    assert left(root / "*.jsonl") == ""
    assert left(root / "**" / "*.jsonl") == f"not read: 1 links to folders: {root}/linked"


def test_the_command_says_what_it_did_not_read(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "a.txt", ".b.txt")
    (root / "empty.txt").touch()
    said: list[str] = []
    build(build_config(tmp_path / "out", source="text", input=[str(root)]), note=said.append)
    assert said == [f"not read: 1 hidden files and folders: {root}/.b.txt", "not read: 1 documents without text: empty.txt"]


def test_the_standard_library_names_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"name = '\xe9'\n")
    os.mkfifo(tmp_path / "pipe.py")
    source = PythonStdlib(tmp_path)
    assert list(source) == list(source) == []
    assert source.unread.lines() == [
        f"not read: 1 *.py that is a FIFO: {tmp_path}/pipe.py",
        "not read: 1 files that do not decode by their own declaration: bad.py",
    ]


def special(path: Path, what: str) -> None:
    if what == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nowhere"}[what])


@pytest.mark.parametrize("what", ["FIFO", "device", "broken link"])
@pytest.mark.parametrize("entry", ["{}/x.jsonl", "{}", "{}/*.jsonl", "{}/**"])
@pytest.mark.timeout(60)
def test_what_is_no_file_ends_the_build(tmp_path: Path, what: str, entry: str) -> None:
    root = write(tmp_path / "in", "good.jsonl")
    special(root / "x.jsonl", what)
    with pytest.raises(UserError, match=rf"input=.*: {root}/x\.jsonl is a {what}, not a regular file"):
        open_source(build_config(tmp_path / "out", source="jsonl", input=[entry.format(root)]))


@pytest.mark.timeout(60)
def test_special_files_that_are_not_asked_for_do_no_harm(tmp_path: Path) -> None:
    root = write(tmp_path / "in", "good.jsonl")
    special(root / "notes", "FIFO")
    assert set(found(root, suffixes=JSONL)) == {"good.jsonl"}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("", "input='' is not a path"),
        ("a\0b", "is not a path"),
        ("x" * 300, "input=x+ matches no file"),
        ("x" * 300 + "*", r"input=x+\* matches no file"),
        ("~nobody-of-this-name/x", "input=~nobody-of-this-name/x: .*write the path out"),
        ("/proc/self/mem/x/*", r"input=.* matches no file"),
        ("nowhere/**/*.txt", r"input=nowhere/\*\*/\*\.txt matches no file"),
    ],
)
def test_inputs_that_name_nothing(entry: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        found(entry)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"hello\n")
    result = command("source=text", f"input=[{tmp_path}]", f"out={tmp_path}/out", "tokenizer=bytes")
    assert result.returncode == 2
    assert result.stderr.startswith("error: input=") and result.stderr.count("\n") == 1
    assert r"caf\xe9.txt is not UTF-8; rename it" in result.stderr
