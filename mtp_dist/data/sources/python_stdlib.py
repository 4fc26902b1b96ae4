"""The Python standard library's own source files, tests included: some 30 MB of real text that every machine has."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from mtp_dist.data.sources.files import NamedFile, total_size
from mtp_dist.data.sources.source import Document

FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


class PythonStdlib:
    """Every *.py file of the running interpreter's standard library, named by its path below it.

    Files that do not decode by their own declaration (PEP 263) are left out: they are the codec tests' bad examples.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._files = list(_find(folder or Path(sysconfig.get_path("stdlib"))))

    def size(self) -> int:
        return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            try:
                with tokenize.open(file.path) as stream:
                    yield Document(file.name, stream.read())
            except (SyntaxError, UnicodeDecodeError):
                continue


def _find(root: Path) -> Iterator[NamedFile]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - FOREIGN)
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(".py") and path.is_file():
                yield NamedFile(path.relative_to(root).as_posix(), path)
