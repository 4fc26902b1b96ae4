"""JSON lines: one object a line, the text in one of its fields. Files may be gzipped."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

from mtp_dist.data.sources.files import NamedFile, find_files, total_size
from mtp_dist.data.sources.source import DOCUMENT_LIMIT, Document, check_field, check_size, check_text, reading
from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.errors import UserError
from mtp_dist.regular_file import open_regular


class JsonLines:
    """Each line is a document, named file#line; empty lines are passed over."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        self.unread = Unread()
        self._files = find_files(inputs, "jsonl", self.unread, (".jsonl", ".jsonl.gz"))
        self._field = field

    def size(self) -> int:
        with reading("input"):
            return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            for number, line in _lines(file):
                if line.strip():
                    where = f"{printable(file.path)} line {number}"
                    with reading(where):
                        text = self._text(line, where, first=number == 1)
                    yield Document(f"{file.name}#{number}", text)

    def _text(self, line: bytes, where: str, first: bool) -> str:
        try:
            # The first line may begin with a byte order mark. As float: other fields may hold integers of any length.
            value = json.loads(line.decode("utf-8-sig" if first else "utf-8"), parse_int=float)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (byte {error.start} of the line); convert the file") from error
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON ({error}); fix or remove the line") from error
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object with a field {self._field!r}; fix or remove the line")
        check_field(self._field, list(value), where)
        return check_text(value[self._field], where, self._field)


def _lines(file: NamedFile) -> Iterator[tuple[int, bytes]]:
    path, number = printable(file.path), 0
    with reading(path), open_regular(file.path) as stored:
        packed = file.path.name.endswith(".gz")
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stored)) if packed else stored
        try:
            if packed and not os.fstat(stored.fileno()).st_size:
                raise EOFError("it is empty")
            while line := stream.readline(DOCUMENT_LIMIT + 2):
                number += 1
                check_size(len(line) - 1, f"{path} line {number}")
                yield number, line
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            place = f"after line {number}: {error}"
            raise UserError(f"{path} is not a whole gzip file ({place}); restore it or leave it out of input") from error
