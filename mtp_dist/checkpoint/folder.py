"""The checkpoints folder of a run: names, the newest, `latest`, and pruning.

A folder `step_00000100` is a complete checkpoint, `step_00000100.tmp-<attempt>` one that was never finished, or whose removal
was not.
"""

import os
import re
import shutil
from pathlib import Path

from mtp_dist.checkpoint.fault import point
from mtp_dist.checkpoint.manifest import MANIFEST, damage, read_manifest, sync_path
from mtp_dist.config.schema import CheckpointConfig
from mtp_dist.errors import UserError
from mtp_dist.standard_streams import say

LATEST = "latest"
SAID_BYTES = 2**30
"""To read so much takes a second or more, and is said."""
_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.tmp-.*")


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Whether their content is sound is another question."""
    if not root.is_dir():
        return []
    found = [entry for entry in root.iterdir() if _NAME.fullmatch(entry.name) and (entry / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def locate(path: str | Path, setting: str = "checkpoint") -> list[Path]:
    """Candidates that a user's path names, best first: a checkpoint itself, or a run folder's checkpoints, newest first.

    Raises UserError where there is none.
    """
    given = Path(path)
    if not str(path):
        raise UserError(f"{setting} is empty; set {setting}=RUN_FOLDER or {setting}=RUN_FOLDER/checkpoints/step_N")
    if not given.is_dir():
        raise UserError(f"{setting}={given} does not exist; give a run folder or a checkpoint folder")
    if (given / MANIFEST).is_file():
        return [given]
    found = complete(given / "checkpoints") or complete(given)
    if not found:
        raise UserError(f"{setting}={given} holds no complete checkpoint; train first, or give another folder")
    return found[::-1]


def sound(path: str | Path, setting: str = "checkpoint") -> Path:
    """The checkpoint that a user's path names (of a run folder: the newest that verifies), checked against its checksums. A
    newer one that does not verify is named.

    Raises UserError where there is none that is sound.
    """
    skipped = []
    for candidate in locate(path, setting):
        try:
            files = read_manifest(candidate).files
            if (size := sum(record.size for record in files.values())) > SAID_BYTES:
                say(f"checking {candidate} ({size / 2**30:.1f} GiB)")
            problem = next((found for name, record in sorted(files.items()) if (found := damage(candidate, name, record))), None)
        except UserError as error:
            skipped.append(str(error))
            continue
        if problem is None:
            for reason in skipped:
                say(f"note: passed over: {reason}")
            return candidate
        skipped.append(f"{candidate.name} is damaged ({problem})")
    raise UserError(f"{setting}={path} holds no sound checkpoint: {'; '.join(skipped)}")


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is no candidate any more, does not count in pruning, and its step can be saved
    again."""
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        target, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
    os.rename(folder, target)
    sync_path(folder.parent)
    return target


def point_latest(root: Path, folder: Path) -> None:
    """Replace the file `latest`, which holds the newest checkpoint's name, in one move."""
    temporary = root / f".{LATEST}.{os.getpid()}"
    temporary.write_text(folder.name + "\n")
    sync_path(temporary)
    point("latest.before")
    os.replace(temporary, root / LATEST)
    sync_path(root)


def require_whole(folder: Path) -> None:
    """Raise OSError unless the manifest verifies and every file has its size: what can be asked of a new checkpoint without
    reading all of it, once the ranks have read back what they wrote."""
    try:
        files = read_manifest(folder).files
    except UserError as error:
        raise OSError(str(error)) from None
    for name, record in files.items():
        if (size := (folder / name).stat().st_size) != record.size:
            raise OSError(f"{folder / name} has {size} bytes instead of {record.size}")


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints that the settings do not keep; the newest always stays. Only after the newest was verified.

    Each loses its name before its files, so that none is ever found in part.
    """
    if config.keep_last == 0:
        return
    for entry in complete(root)[: -config.keep_last]:
        if config.keep_every_steps and step_of(entry) % config.keep_every_steps == 0:
            continue
        doomed = entry.with_name(f"{entry.name}.tmp-pruned")
        os.rename(entry, doomed)
        point("prune.middle")
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what saves and prunings left that never came to their end. Only where none can be going on."""
    if not root.is_dir():
        return
    for entry in root.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith(f".{LATEST}."):
            entry.unlink(missing_ok=True)
