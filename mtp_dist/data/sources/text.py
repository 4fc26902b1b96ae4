"""Plain UTF-8 text files: one document a file, or several divided by a separator."""

import codecs
from collections.abc import Iterator, Sequence

from mtp_dist.data.sources.files import NamedFile, find_files, total_size
from mtp_dist.data.sources.source import Document, check_size, reading
from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.errors import UserError
from mtp_dist.regular_file import open_regular

CHUNK = 2**20  # bytes read at a time


class TextFiles:
    """Each file is a document; with a separator each piece between two, named file#number. A byte order mark is no text."""

    def __init__(self, inputs: Sequence[str], separator: str) -> None:
        self.unread = Unread()
        self._files = find_files(inputs, "text", self.unread)
        self._separator = separator

    def size(self) -> int:
        with reading("input"):
            return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            with reading(printable(file.path)):
                if self._separator:
                    for number, piece in enumerate(_pieces(file, self._separator)):
                        yield Document(f"{file.name}#{number}", piece)
                else:
                    yield Document(file.name, _whole(file))


def _whole(file: NamedFile) -> str:
    found, size = [], 0
    for chunk in _chunks(file):
        size += len(chunk)  # characters, of a byte or more
        check_size(size, f"{printable(file.path)} (set separator= if it holds several documents)")
        found.append(chunk)
    return "".join(found)


def _pieces(file: NamedFile, separator: str) -> Iterator[str]:
    """As `str.split`, with one piece in memory at a time."""
    parts: list[str] = []  # of the current piece, which no separator ends yet
    size, tail = 0, ""  # the tail may be the beginning of a separator
    for chunk in _chunks(file):
        first, *others = (tail + chunk).split(separator)
        if others:
            yield "".join([*parts, first])
            yield from others[:-1]
            parts, size, first = [], 0, others[-1]
        certain = max(len(first) - len(separator) + 1, 0)
        parts.append(first[:certain])
        tail, size = first[certain:], size + certain
        check_size(size, f"a document of {printable(file.path)}")
    yield "".join([*parts, tail])


def _chunks(file: NamedFile) -> Iterator[str]:
    """The text in parts. Bytes, not text mode: line ends stay what they are."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with open_regular(file.path) as stream:
        while True:
            data = stream.read(CHUNK)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = start - held + error.start
                raise UserError(
                    f"{printable(file.path)} is not UTF-8 (byte {place}); convert it or leave it out of input"
                ) from error
            yield text.removeprefix("\ufeff") if start == 0 else text
            if not data:
                return
            start += len(data)
