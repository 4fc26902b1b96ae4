"""The Python standard library's own source files, tests included: some 30 MB of real text that every machine has."""

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from mtp_dist.data.sources.files import NamedFile, total_size
from mtp_dist.data.sources.source import DOCUMENT_LIMIT, Document, reading
from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.regular_file import kind, read_regular

FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


class PythonStdlib:
    """Every *.py file of the running interpreter's standard library, named by its path below it.

    Files that do not decode by their own declaration (PEP 263) are left out: they are the codec tests' bad examples.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.unread, self._undecodable = Unread(), set[str]()
        with reading("the standard library"):
            self._files = list(_find(folder or Path(sysconfig.get_path("stdlib")), self.unread))

    def size(self) -> int:
        with reading("the standard library"):
            return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            with reading(printable(file.path)):
                data = read_regular(file.path, DOCUMENT_LIMIT)
                try:
                    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
                    # As tokenize.open: line ends become "\n".
                    text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
                except (SyntaxError, UnicodeDecodeError):
                    if file.name not in self._undecodable:  # once, however often it is read
                        self._undecodable.add(file.name)
                        self.unread.add("files that do not decode by their own declaration", file.name)
                    continue
                yield Document(file.name, text)


def _find(root: Path, unread: Unread) -> Iterator[NamedFile]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(set(folders) - FOREIGN)
        for name in sorted(names):
            path = Path(parent, name)
            if not name.endswith(".py"):
                continue
            if (what := kind(path)) == "a regular file":
                yield NamedFile(path.relative_to(root).as_posix(), path)
            else:
                unread.add(f"*.py that is {what}", path)
