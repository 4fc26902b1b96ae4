"""The `input` setting: files, folders and glob patterns, as a list of files with names, and what they cover but is not read.

A file's name decides its split, so it depends on the input and the file alone, never on which other files are there: it is
the path below the folder, below the part of the pattern before its first wildcard, or the bare name of a file given as such.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.errors import UserError
from mtp_dist.regular_file import kind

EVERYTHING_BELOW = "**"


class NamedFile(NamedTuple):
    """`name`: path below the folder or the pattern's fixed part that it was found by."""

    name: str
    path: Path


def find_files(inputs: Sequence[str], source: str, unread: Unread, suffixes: tuple[str, ...] = ("",)) -> list[NamedFile]:
    """Files in the order of `inputs`, sorted by name within each. In folders: all that end with one of `suffixes`, not hidden;
    what is passed over there is noted in `unread`. A file that several inputs cover is named by the first.

    Raises UserError where no input is given, or one names nothing, a thing that is not a file, or a name that is not UTF-8.
    """
    if not inputs:
        raise UserError(f"source={source} needs input=[...]: files, folders or glob patterns")
    found: dict[str, NamedFile] = {}
    for entry in inputs:
        files = _expand(entry, suffixes, unread)
        if not files:
            wanted = f" ending in {' or '.join(suffixes)}" if any(suffixes) else ""
            raise UserError(f"input={entry} matches no file{wanted}; name existing files, folders or glob patterns")
        for identity, file in sorted(files.items(), key=lambda item: item[1]):
            found.setdefault(identity, file)
    return list(found.values())


def total_size(files: Sequence[NamedFile]) -> int:
    """Bytes of all files."""
    return sum(file.path.stat().st_size for file in files)


def home_expanded(entry: str, setting: str) -> Path:
    """The path with `~` replaced. Raises UserError where it is empty, holds a NUL or names a home that is not known."""
    if not entry or "\0" in entry:
        raise UserError(f"{setting}={entry!r} is not a path; name one")
    try:
        return Path(entry).expanduser()
    except RuntimeError as error:
        raise UserError(f"{setting}={entry}: {error}; write the path out") from None


def check_name(entry: str, path: Path, name: str) -> None:
    """Raises UserError where the name of a document's source is not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"input={printable(entry)}: the name of {printable(path)} is not UTF-8; rename it or leave it out"
        ) from None


def _expand(entry: str, suffixes: tuple[str, ...], unread: Unread) -> dict[str, NamedFile]:
    """The files that one input covers, by their identity."""
    path = home_expanded(entry, "input")
    try:
        if os.path.lexists(path):
            if not path.is_dir():
                return _identified(entry, path.parent, [path])
            return _identified(entry, path, _below(path, (EVERYTHING_BELOW,), unread, suffixes))
        fixed = [*path.parts]
        while fixed and glob.has_magic("/".join(fixed)):
            fixed.pop()
        root, pattern = Path(*fixed), path.parts[len(fixed) :]
        return _identified(entry, root, _below(root, pattern, unread) if pattern and root.is_dir() else ())
    except OSError as error:
        place = error.filename or entry
        said = error.strerror or error
        raise UserError(f"input={entry}: {printable(place)} cannot be read ({said}); fix it or leave it out") from None


def _identified(entry: str, root: Path, paths: Iterator[Path] | Sequence[Path]) -> dict[str, NamedFile]:
    """A link to a file below `root` is that file, under its own name; any other link is a file like others."""
    below, found = os.path.realpath(root), {}
    for path in paths:
        if (what := kind(path)) != "a regular file":
            raise UserError(f"input={entry}: {printable(path)} is {what}, not a regular file; remove it or leave it out of input")
        real = os.path.realpath(path)
        inside = os.path.commonpath([below, real]) == below
        name = os.path.relpath(real, below) if inside else os.path.relpath(path, root)
        check_name(entry, path, name)
        found[real if inside else os.path.abspath(path)] = NamedFile(Path(name).as_posix(), path)
    return found


def _below(root: Path, pattern: tuple[str, ...], unread: Unread, suffixes: tuple[str, ...] | None = None) -> Iterator[Path]:
    """What lies below `root` and matches, as `glob` does, except that `**` does not follow links to folders (they may lead back
    up). With `suffixes`, `root` is an input itself, so what is passed over there is noted."""
    # A stack, not recursion: a tree may be deeper than Python's stack.
    waiting = [(root, pattern)]
    while waiting:
        folder, (part, *rest) = waiting.pop()
        if part == EVERYTHING_BELOW and rest:
            waiting.append((folder, tuple(rest)))
        for name in _names(folder, part):
            path = folder / name
            is_folder = path.is_dir()
            if part == EVERYTHING_BELOW:
                if name.startswith("."):
                    if suffixes is not None:
                        unread.add("hidden files and folders", path)
                elif is_folder and path.is_symlink():
                    unread.add("links to folders", path)
                elif is_folder:
                    waiting.append((path, (part, *rest)))
                elif not rest and (suffixes is None or name.endswith(suffixes)):
                    yield path
                elif not rest:
                    unread.add(f"files that do not end in {' or '.join(suffixes or ())}", path)
            elif rest and is_folder:
                waiting.append((path, tuple(rest)))
            elif not rest and not is_folder:
                yield path
            elif not rest and EVERYTHING_BELOW not in pattern:
                unread.add("folders that a pattern matches (for the files in them, write FOLDER/*)", path)


def _names(folder: Path, part: str) -> list[str]:
    """Entries of a folder that one part of a pattern matches; hidden ones only where it begins with a dot, as in a shell."""
    if part == EVERYTHING_BELOW:
        return os.listdir(folder)
    if not glob.has_magic(part):
        return [part] if os.path.lexists(folder / part) else []
    fits = re.compile(fnmatch.translate(part)).match
    return [name for name in os.listdir(folder) if fits(name) and name.startswith(".") <= part.startswith(".")]
