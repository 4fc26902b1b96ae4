"""JSON lines: one object a line, the text in one of its fields. Files may be gzipped."""

import gzip
import json
from collections.abc import Iterator, Sequence

from mtp_dist.data.sources.files import NamedFile, find_files, total_size
from mtp_dist.data.sources.source import Document, check_field, check_text
from mtp_dist.errors import UserError


class JsonLines:
    """Each line is a document, named file#line; empty lines are passed over."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        self._files = find_files(inputs, "jsonl", (".jsonl", ".jsonl.gz"))
        self._field = field

    def size(self) -> int:
        return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            for number, line in _lines(file):
                where = f"{file.path} line {number}"
                if line.strip():
                    yield Document(f"{file.name}#{number}", self._text(line, where))

    def _text(self, line: bytes, where: str) -> str:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON ({error}); mend or remove the line") from error
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object with a field {self._field!r}; mend or remove the line")
        check_field(self._field, list(value), where)
        return check_text(value[self._field], where, self._field)


def _lines(file: NamedFile) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(file.path) if file.name.endswith(".gz") else file.path.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{file.path} is not a whole gzip file ({error}); restore it or leave it out of input") from error
