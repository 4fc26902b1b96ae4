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

    What an interrupted build has left is removed first. Raises UserError where another build writes there, or a folder of
    that name was not made by a build.
    """
    folder = out.with_name(out.name + ".building")
    with _marked(folder, out) as marker:
        try:
            # Held until the process ends, however it ends.
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another build is writing {folder}; wait for it, or choose another out=") from error
        _empty(folder)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder)
            raise
        _make_durable(folder)
        folder.rename(out)
        # After the rename: killed in between, a complete dataset keeps a stray file, and nothing is lost.
        (out / MARKER).unlink()
        _sync(out.parent)


def _marked(folder: Path, out: Path) -> IO[str]:
    """The open marker of the folder, both made if they are missing."""
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UserError(f"{folder} is in the way and was not made by a build; move it, or choose another out=")
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / MARKER).open("w")
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; choose another out=") from None


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
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
