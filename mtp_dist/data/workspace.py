"""The folder in which a dataset is built: beside its final place, renamed when complete, never mistaken for a dataset."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mtp_dist.errors import UserError

MARKER = "UNFINISHED"


@contextmanager
def building_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes `out` when the block ends without an error.

    What an interrupted build has left is removed first. Raises UserError where another build writes there, a thing of that name
    was not made by a build, or the block ends with an OSError: nothing but the folder may raise one in there.
    """
    place = Path(os.path.abspath(out))
    if place == Path.cwd() or not place.name:  # a folder that is replaced leaves its shell nowhere
        raise UserError(f"out={out} is the current folder or the root; choose another out=")
    folder = place.with_name(place.name + ".building")
    try:
        with _marked(folder) as marker:
            try:
                # Held until the process ends, however it ends.
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another build is writing {folder}; wait for it, or choose another out=") from error
            _empty(folder)
            try:
                yield folder
                _make_durable(folder)
                folder.rename(place)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            # After the rename: killed in between, a complete dataset keeps a stray file, and nothing is lost.
            (place / MARKER).unlink()
            _sync(place.parent)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror or error}; choose another out=") from error


def _marked(folder: Path) -> IO[str]:
    """The open marker of the folder, both made if they are missing."""
    there = os.path.lexists(folder)
    if there and (folder.is_symlink() or not folder.is_dir() or (os.listdir(folder) and not _is_regular(folder / MARKER))):
        raise UserError(f"{folder} is in the way and was not made by a build; move it, or choose another out=")
    folder.mkdir(parents=True, exist_ok=True)
    # Not emptied, not through a link, and without waiting for the other end of a FIFO.
    opened = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return os.fdopen(opened, "r+")


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def check_free(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` has less than `needed` bytes left."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"out={folder} needs about {needed / 2**20:.0f} MiB of disk, {free / 2**20:.0f} MiB are free; "
            "free some, choose another out=, or set limit_mb"
        )


def _make_durable(folder: Path) -> None:
    """Everything in a folder survives a power failure from here on."""
    for entry in folder.rglob("*"):
        _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
