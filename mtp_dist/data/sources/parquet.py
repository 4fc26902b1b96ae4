"""Parquet files (pyarrow): the text in one column."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mtp_dist.data.sources.files import NamedFile, find_files
from mtp_dist.data.sources.source import Document, check_field, check_text, optional_package, reading
from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.regular_file import open_regular

BATCH = 256  # rows held in memory at a time


class ParquetFiles:
    """Each row is a document, named file#row."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        self.unread = Unread()
        optional_package("pyarrow", "parquet")
        self._files = find_files(inputs, "parquet", self.unread, (".parquet",))
        self._field = field

    def size(self) -> int:
        size = 0
        for file in self._files:
            with self._open(file) as opened:
                size += _column_size(opened, self._field)
        return size

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            number, path = 0, printable(file.path)
            with self._open(file) as opened:
                for batch in opened.iter_batches(batch_size=BATCH, columns=[self._field]):
                    for value in column_values(batch.column(0)):
                        yield Document(f"{file.name}#{number}", check_text(value, f"{path} row {number}", self._field))
                        number += 1

    @contextmanager
    def _open(self, file: NamedFile) -> Iterator[Any]:
        import pyarrow.parquet

        where = printable(file.path)
        with reading(f"Parquet file {where}"), open_regular(file.path) as stream:
            # Checksums are optional in the format: they are compared where the writer stored them.
            opened = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            check_field(self._field, opened.schema_arrow.names, where)
            yield opened


def column_values(column: Any) -> list[object]:
    """The values of an Arrow array, as Python objects. Raises pyarrow.ArrowInvalid where offsets lead out of the data or text is
    not UTF-8."""
    column.validate(full=True)
    return list(column.to_pylist())


def _column_size(file: Any, field: str) -> int:
    groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
