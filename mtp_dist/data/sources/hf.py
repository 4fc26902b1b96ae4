"""Folders written by Hugging Face `datasets` (`Dataset.save_to_disk`).

Such a folder is a state.json, which lists Arrow streams, and those. They are read with pyarrow alone: the format that was set
when the dataset was saved (columns, torch, arrow, ...) then does not matter, and a stream that was cut between two batches is
recognised by the missing mark at its end, which neither library asks for.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mtp_dist.data.sources.files import check_name, home_expanded
from mtp_dist.data.sources.parquet import column_values
from mtp_dist.data.sources.source import Document, check_field, check_text, optional_package, reading
from mtp_dist.data.sources.unread import Unread, printable
from mtp_dist.errors import UserError
from mtp_dist.regular_file import MIB, read_regular, require_regular

STATE = "state.json"
SPLITS = "dataset_dict.json"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
SMALLER_BATCH = 256  # rows turned into text at a time


class SavedDataset(NamedTuple):
    """`name`: of its folder."""

    name: str
    files: list[Path]


class SavedDatasets:
    """Each row is a document, named folder#row."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        self.unread = Unread()
        if not inputs:
            raise UserError("source=hf needs input=[...]: folders written by datasets' save_to_disk")
        optional_package("pyarrow", "hf")
        self._field = field
        self._saved = [_described(entry) for entry in inputs]
        for saved in self._saved:
            for file in saved.files:
                with self._open(file):
                    pass

    def size(self) -> int:
        size = 0
        for saved in self._saved:
            for file in saved.files:
                with self._open(file) as batches:
                    size += sum(batch.get_total_buffer_size() for batch in batches)
        return size

    def __iter__(self) -> Iterator[Document]:
        for saved in self._saved:
            number = 0
            for file in saved.files:
                with self._open(file) as batches:
                    for batch in batches:
                        column = batch.column(0)
                        for start in range(0, len(column), SMALLER_BATCH):
                            for value in column_values(column.slice(start, SMALLER_BATCH)):
                                where = f"{printable(file)} row {number} of {saved.name}"
                                yield Document(f"{saved.name}#{number}", check_text(value, where, self._field))
                                number += 1

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        """The batches of one Arrow stream, with the text's column alone."""
        import pyarrow

        with reading(printable(file)):
            if require_regular(file) == 0 or not _ends_properly(file):
                raise UserError(f"{printable(file)} is cut off (no end of its Arrow stream); restore it or leave it out of input")
            with pyarrow.memory_map(str(file)) as mapped:
                with pyarrow.ipc.open_stream(mapped) as stream:
                    names = stream.schema.names
                check_field(self._field, names, printable(file))
                mapped.seek(0)
                column = pyarrow.ipc.IpcReadOptions(included_fields=[names.index(self._field)])
                with pyarrow.ipc.open_stream(mapped, options=column) as stream:
                    yield stream


def _ends_properly(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - len(END_OF_STREAM), 0))
        return stream.read() == END_OF_STREAM


def _described(entry: str) -> SavedDataset:
    """The dataset that a folder's state.json describes. Raises UserError where it is not one, or several."""
    folder = home_expanded(entry, "input")
    check_name(entry, folder, folder.name)
    with reading(f"input={entry}"):
        if not folder.is_dir():
            raise _foreign(entry)
        if (folder / SPLITS).exists():
            # Mixing a test split into the training data must be a decision, not a default.
            splits = json.loads(read_regular(folder / SPLITS, MIB))["splits"]
            listed = ", ".join(f"{entry}/{name}" for name in splits)
            raise UserError(f"input={entry} holds several splits; name those to read: {listed}")
        if not (folder / STATE).exists():
            raise _foreign(entry)
        state = json.loads(read_regular(folder / STATE, 64 * MIB))
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise UserError(f"input={entry} holds a selection of rows, as old versions of datasets saved it; save it again")
        names = [file["filename"] for file in state["_data_files"]]
        for name in names:
            if Path(name).name != name:
                raise UserError(f"input={entry}: {STATE} names the file {name!r}, which is not in the folder; restore it")
    return SavedDataset(folder.name, [folder / name for name in names])


def _foreign(entry: str) -> UserError:
    return UserError(f"input={entry} is not a folder written by datasets' save_to_disk; name one")
