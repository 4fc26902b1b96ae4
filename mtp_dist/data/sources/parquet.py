"""Parquet files (pyarrow): the text in one column."""

from collections.abc import Iterator, Sequence
from typing import Any

from mtp_dist.data.sources.files import NamedFile, find_files
from mtp_dist.data.sources.source import Document, check_field, check_text, optional_package
from mtp_dist.errors import UserError

BATCH = 1024  # rows held in memory at a time


class ParquetFiles:
    """Each row is a document, named file#row."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        optional_package("pyarrow", "parquet")
        self._files = find_files(inputs, "parquet", (".parquet",))
        self._field = field

    def size(self) -> int:
        return sum(_column_size(self._open(file), self._field) for file in self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            number = 0
            for batch in self._open(file).iter_batches(batch_size=BATCH, columns=[self._field]):
                for value in batch.column(0).to_pylist():
                    yield Document(f"{file.name}#{number}", check_text(value, f"{file.path} row {number}", self._field))
                    number += 1

    def _open(self, file: NamedFile) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            opened = pyarrow.parquet.ParquetFile(file.path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.path} is not a Parquet file ({error}); mend input") from error
        check_field(self._field, opened.schema_arrow.names, str(file.path))
        return opened


def _column_size(file: Any, field: str) -> int:
    groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
