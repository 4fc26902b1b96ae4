"""The shell of every entry point: ``--help``, ``--cfg``, ``key=value`` overrides, and errors as one line.

Contract: exit status 0 done, 2 bad input (``error: ...`` on the standard error), 130 interrupted; else what the command returned.
Nothing here imports torch: help and bad settings are answered at once.
"""

import errno
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn, TextIO, TypeVar, cast

import yaml  # type: ignore[import-untyped]

from mtp_dist import __version__
from mtp_dist.config.bounds import bounds_of
from mtp_dist.config.compose import compose, config_groups, settings, type_name
from mtp_dist.config.folder import groups
from mtp_dist.config.schema import describe
from mtp_dist.errors import UserError

T = TypeVar("T")
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""No program's fault: said in one line, wherever it happens."""


def application(
    config_name: str,
    schema: type[T],
    run: Callable[[T], int | None],
    *,
    argv: Sequence[str] | None = None,
    command: str | None = None,
    examples: Sequence[str] = (),
    epilog: str = "",
    shortcut: Callable[[list[str]], T | None] | None = None,
    paths: Sequence[str] = (),
) -> NoReturn:
    """Compose ``conf/<config_name>.yaml`` from the command line, call ``run`` with it, and exit with what it returns.

    ``argv``: arguments without the program's name; None takes the process's own. ``command``, ``examples``, ``epilog``: shown by
    ``--help``; the command is otherwise the one in the schema's docstring. ``shortcut``: gives a configuration for some overrides
    without composing, or None. ``paths``: settings whose names may be left out, in this order.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if paths:
        arguments = named(arguments, schema, paths)
    sys.exit(guarded(lambda: _answer(config_name, schema, run, shortcut, arguments, (command, examples, epilog))))


def named(words: Sequence[str], schema: type, paths: Sequence[str]) -> list[str]:
    """The arguments with the names of ``paths`` put before bare words. A path may hold an equals sign (``runs/lr=0.1``): what
    stands before it is then no setting, and has a slash or there is such a file."""
    known, names = settings(schema), iter(paths)

    def is_path(word: str) -> bool:
        key, equals, _ = word.partition("=")
        if word.startswith(("-", "+", "~")) or (equals and key in known):
            return False
        return not equals or "/" in key or os.path.lexists(word)

    return [f"{next(names, paths[-1])}={word}" if is_path(word) else word for word in words]


def guarded(action: Callable[[], int | None]) -> int:
    """Call ``action`` and return the exit status of the process: the user's errors in one line, no traceback."""
    open_output()
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) or _output_fails():
            return _lost_output(error)
        if error.errno not in DISK_TROUBLE:
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 2


def open_output() -> None:
    """Called once, first. Characters that the standard output's encoding lacks are then written as escapes (``\\u03bb``) where
    they would raise; an output that is closed takes everything."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _output_fails() -> bool:
    """Whether it is the standard output that cannot be written (a full disk). An error of writing names no file; a second try
    tells."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


class LastingOutput(io.TextIOBase):
    """The standard output of a process that others wait for: once it fails it takes everything, so that all end together."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def status(self) -> int:
        """The exit status, said in one line where it is not 0."""
        self.flush()
        return 0 if self.failure is None else _lost_output(self.failure)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                action()
            except OSError as error:
                self.failure = error


def _lost_output(error: OSError) -> int:
    """The exit status of a process whose standard output cannot be written. A reader that left (`| head`) has what it wants."""
    status = 0 if isinstance(error, BrokenPipeError) else 2
    if status:
        print(f"error: the standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    # Python would complain once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def help_text(
    config_name: str, schema: type, command: str | None = None, examples: Sequence[str] = (), epilog: str = ""
) -> str:
    """The whole answer to ``--help``."""
    documented, summary = _introduction(schema)
    parts = [f"usage: {command or documented} [--help] [--cfg] [--version] [key=value ...]"]
    if summary:
        parts.append(summary)
    if examples:
        parts.append("examples:\n" + "\n".join(f"  {line}" for line in examples))
    chosen = config_groups(config_name)
    if chosen:
        options = groups()
        rows = [f"  {name}={'|'.join(options.get(name, []))}   ({first or 'null'})" for name, first in chosen.items()]
        parts.append("groups (conf/GROUP/OPTION.yaml):\n" + "\n".join(rows))
    parts.append("settings (key=default):\n" + "\n".join(_rows(compose(config_name, schema, []), "")))
    parts.append("--cfg prints the composed settings and stops.")
    if epilog:
        parts.append(epilog)
    return "\n\n".join(parts) + "\n"


def _answer(
    config_name: str,
    schema: type[T],
    run: Callable[[T], int | None],
    shortcut: Callable[[list[str]], T | None] | None,
    arguments: list[str],
    shown_by_help: tuple[str | None, Sequence[str], str],
) -> int | None:
    flags = [word for word in arguments if word.startswith("-")]
    overrides = [word for word in arguments if not word.startswith("-")]
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(help_text(config_name, schema, *shown_by_help))
        sys.stdout.flush()
        return 0
    if "--version" in flags:
        print(f"mtp_dist {__version__}")
        return 0
    for flag in flags:
        if flag != "--cfg":
            raise UserError(f"{flag} is not an option; there are --help, --cfg and --version, and settings are written key=value")
    ready = shortcut(overrides) if shortcut else None
    config = compose(config_name, schema, overrides) if ready is None else ready
    if flags:
        yaml.safe_dump(asdict(cast(Any, config)), sys.stdout, sort_keys=False, allow_unicode=True, width=1000)
        sys.stdout.flush()
        return 0
    return run(config)


def _introduction(schema: type) -> tuple[str, str]:
    """The command and the sentences after it, from a schema's docstring of the form "`command`: what it does"."""
    text = " ".join((schema.__doc__ or "").split())
    match = re.match(r"`([^`]+)`[.:]?\s*(.*)", text)
    if match is None:
        return sys.argv[0], text
    summary = match[2]
    return match[1], summary[:1].upper() + summary[1:]


def _rows(config: Any, prefix: str) -> list[str]:
    """Two lines a setting, with the values of ``config``; a group's settings follow the single ones."""
    rows: list[str] = []
    members = describe(type(config))
    for name, (kind, _, text) in members.items():
        if not is_dataclass(kind):
            bounds = bounds_of(f"{prefix}{name}", kind)
            span = f", {bounds}" if bounds is not None else ""
            rows.append(f"  {prefix}{name}={shown(getattr(config, name))}  [{type_name(kind)}{span}]")
            rows.extend(textwrap.wrap(text, width=116, initial_indent="      ", subsequent_indent="      "))
    for name, (kind, _, text) in members.items():
        if is_dataclass(kind):
            rows.extend(["", f" {prefix}{name}: {text}", *_rows(getattr(config, name), f"{prefix}{name}.")])
    return rows


def shown(default: Any) -> str:
    """A default as one would type it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default)
