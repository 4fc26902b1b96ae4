"""The interface of a source, and the choice of one."""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol

from mtp_dist.config.schema import ShardBuild
from mtp_dist.errors import UserError

KINDS = ("python_stdlib", "text", "jsonl", "parquet", "hf")


class Document(NamedTuple):
    """`name` says where the text is from; it decides the split, so it must not depend on the machine."""

    name: str
    text: str


class Source(Protocol):
    """Documents that can be read several times, always the same in the same order."""

    def size(self) -> int:
        """Bytes of text, about."""
        ...

    def __iter__(self) -> Iterator[Document]:
        """Raises UserError where the input is not what the source expects."""
        ...


def open_source(config: ShardBuild) -> Source:
    """The source that `config.source` names; raises UserError where there is none or its input does not fit."""
    from mtp_dist.data.sources import hf, jsonl, parquet, python_stdlib, text

    if config.source == "python_stdlib":
        return python_stdlib.PythonStdlib()
    if config.source == "text":
        return text.TextFiles(config.input, config.separator)
    if config.source == "jsonl":
        return jsonl.JsonLines(config.input, config.field)
    if config.source == "parquet":
        return parquet.ParquetFiles(config.input, config.field)
    if config.source == "hf":
        return hf.SavedDatasets(config.input, config.field)
    raise UserError(f"source={config.source} is unknown; choose {', '.join(KINDS)}")


def optional_package(name: str, source: str) -> ModuleType:
    """Import a package that only one source needs; raises UserError with the way to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"source={source} needs the package {name}; install it: pip install {name}") from error


def check_text(value: object, where: str, field: str) -> str:
    """`value` if it is text that UTF-8 can hold; raises UserError naming `where`."""
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}: field {field!r} holds {kind}, not text; choose another field= or mend the input")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds half of a surrogate pair, which is not text; mend the input") from error
    return value


def check_field(field: str, fields: list[str], where: str) -> None:
    """Raises UserError where `field` is not one of `fields`."""
    if field not in fields:
        raise UserError(f"field={field} is not in {where}; it has {', '.join(map(str, fields)) or 'none'}")
