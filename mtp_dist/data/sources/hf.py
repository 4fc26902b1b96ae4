"""Folders written by Hugging Face `datasets` (`Dataset.save_to_disk`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_dist.data.sources.source import Document, check_field, check_text, optional_package
from mtp_dist.errors import UserError


class SavedDatasets:
    """Each row is a document, named folder#row."""

    def __init__(self, inputs: Sequence[str], field: str) -> None:
        if not inputs:
            raise UserError("source=hf needs input=[...]: folders written by datasets' save_to_disk")
        datasets = optional_package("datasets", "hf")
        self._field = field
        self._tables = [(Path(entry).name, _load(datasets, entry)) for entry in inputs]
        for name, table in self._tables:
            check_field(field, table.column_names, f"dataset {name}")

    def size(self) -> int:
        return sum(table.select_columns([self._field]).data.nbytes for _, table in self._tables)

    def __iter__(self) -> Iterator[Document]:
        for name, table in self._tables:
            for number, row in enumerate(table.select_columns([self._field])):
                yield Document(f"{name}#{number}", check_text(row[self._field], f"{name} row {number}", self._field))


def _load(datasets: Any, entry: str) -> Any:
    try:
        loaded = datasets.load_from_disk(entry)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"input={entry} is not a folder written by datasets' save_to_disk; name one") from error
    if isinstance(loaded, datasets.DatasetDict):
        # Mixing a test split into the training data must be a decision, not a default.
        splits = ", ".join(f"{entry}/{name}" for name in loaded)
        raise UserError(f"input={entry} holds several splits; name those to read: {splits}")
    return loaded
