"""The `input` setting: files, folders and glob patterns, as a sorted list of files."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mtp_dist.errors import UserError


class NamedFile(NamedTuple):
    """`name`: path below the folder or the pattern's fixed part that it was found by."""

    name: str
    path: Path


def find_files(inputs: Sequence[str], source: str, suffixes: tuple[str, ...] = ("",)) -> list[NamedFile]:
    """Files in the order of `inputs`, sorted by name within each. In folders: all that end with one of `suffixes`, not hidden.

    Raises UserError where an input names nothing, or no input is given.
    """
    if not inputs:
        raise UserError(f"source={source} needs input=[...]: files, folders or glob patterns")
    found: dict[Path, NamedFile] = {}
    for entry in inputs:
        files = sorted(_expand(entry, suffixes))
        if not files:
            wanted = f" ending in {' or '.join(suffixes)}" if any(suffixes) else ""
            raise UserError(f"input={entry} matches no file{wanted}; name existing files, folders or glob patterns")
        for file in files:
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def total_size(files: Sequence[NamedFile]) -> int:
    """Bytes of all files."""
    return sum(file.path.stat().st_size for file in files)


def _expand(entry: str, suffixes: tuple[str, ...]) -> Iterator[NamedFile]:
    path = Path(entry).expanduser()
    if path.is_file():
        yield NamedFile(path.name, path)
    elif path.is_dir():
        yield from _walk(path, suffixes)
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
        for file in files:
            yield NamedFile(file.relative_to(root).as_posix(), file)


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[NamedFile]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and name.endswith(suffixes) and path.is_file():
                yield NamedFile(path.relative_to(folder).as_posix(), path)
