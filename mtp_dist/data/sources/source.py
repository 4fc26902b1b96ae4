"""The interface of a source, the choice of one, and what every source checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol

from mtp_dist.config.schema import ShardBuild
from mtp_dist.data.sources.unread import Unread
from mtp_dist.errors import UserError

KINDS = ("python_stdlib", "text", "jsonl", "parquet", "hf")
DOCUMENT_LIMIT = 256 * 2**20
"""Bytes of one document or line at most. Tokenizing takes several times as much memory, and a gzip file of a megabyte may hold a
line of a gigabyte."""


class Document(NamedTuple):
    """`name` says where the text is from; it decides the split, so it must not depend on the machine."""

    name: str
    text: str


class Source(Protocol):
    """Documents that can be read several times, always the same in the same order."""

    unread: Unread

    def size(self) -> int:
        """Bytes of text, about. Raises UserError where the input cannot be read."""
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


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Any failure inside is a UserError that names `where`. Only for code that decodes input: gzip, Arrow, Parquet and JSON
    readers raise whatever the damage leads to."""
    try:
        yield
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; fix it or leave it out of input") from None
    except MemoryError:
        raise UserError(f"{where} does not fit into memory; divide it or leave it out of input") from None
    except Exception as error:
        said = (getattr(error, "strerror", None) or " ".join(str(error).split()) or "damaged")[:200]
        raise UserError(f"{where} cannot be read ({type(error).__name__}: {said}); restore or leave out this input") from error


def optional_package(name: str, source: str) -> ModuleType:
    """Import a package that only one source needs; raises UserError with the way to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"source={source} needs the package {name}; install it: pip install {name}") from error


def check_text(value: object, where: str, field: str) -> str:
    """`value` if it is text that UTF-8 can hold and not too long; raises UserError naming `where`."""
    if not isinstance(value, str):
        kind = "nothing" if value is None else "a number" if type(value) in (int, float) else type(value).__name__
        raise UserError(f"{where}: field {field!r} holds {kind}, not text; choose another field= or fix the input")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds half of a surrogate pair, which is not text; fix the input") from error
    check_size(size, where)
    return value


def check_size(size: int, where: str) -> None:
    """Raises UserError where a document of `size` bytes, or one that is `size` bytes so far, is too long."""
    if size > DOCUMENT_LIMIT:
        raise UserError(f"{where} is longer than {DOCUMENT_LIMIT // 2**20} MiB, too long for one document; divide it")


def check_field(field: str, fields: list[str], where: str) -> None:
    """Raises UserError where `field` is not one of `fields`."""
    if field not in fields:
        names = ", ".join(map(str, fields[:20])) or "none"
        raise UserError(f"field={field} is not in {where}; it has {names}{', ...' if len(fields) > 20 else ''}")
