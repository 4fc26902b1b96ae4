"""Saving: every rank writes the fragments that it owns, in the background; rank 0 commits.

A save has three phases, and each rank is always told in which one all of them are:

1. *snapshot*, the only one that training waits for: each rank copies what it owns into a buffer of its own;
2. *write*: a thread of each rank writes its file, forces it to the disk and reads it back;
3. *commit*: a thread of rank 0 adds settings, tokenizer and manifest, renames the folder, points `latest` at it, and prunes.

Threads touch files and nothing else. The step from one phase to the next is agreed on in the main threads, with the flags that
ranks exchange after every training step anyway (``wishes`` and ``advance``). So no collective runs beside another, on whatever
backend; a rank that dies in a save is noticed where any dead rank is, at the next collective of training; and a stop has nothing
to cancel: ``finish`` joins the threads and agrees twice. The price: a commit begins with the first step that ends after the last
file is written, not at once.

At most one save is in flight, since there is one buffer: the next save first waits for the one before. Without
``checkpoint.asynchronous`` there is no buffer, and ``begin`` waits for the whole save. A save that fails on any rank raises
AgreedError on all of them, after the step in which the last rank has noticed; it leaves no trace but the message, and the last
checkpoint stays.
"""

import os
import platform
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mtp_dist
from mtp_dist.checkpoint import folder as folders
from mtp_dist.checkpoint.fault import point
from mtp_dist.checkpoint.fragment_file import FragmentFile
from mtp_dist.checkpoint.manifest import (
    CONFIG,
    DRAFT_TOKENS,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    WITH_DRAFT_TOKENS,
    WITH_OWN_MATRICES,
    FileRecord,
    Manifest,
    ParameterRecord,
    file_record,
    sync_path,
)
from mtp_dist.config import compose
from mtp_dist.config.heads import OWN_EMBEDDING, contract, owns_embeddings, owns_projections
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import AgreedError
from mtp_dist.parallel.engine import Engine
from mtp_dist.parallel.mesh import Mesh


class _Work:
    """A thread that does one thing: what came of it, or in ``problem`` why nothing did."""

    def __init__(self, action: Callable[[], Any], place: Path) -> None:
        self.result: Any = None
        self.problem: str | None = None
        self._action, self._place = action, place
        # A daemon: a rank that fails in training must not wait for a disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._action()
        except OSError as error:
            self.problem = f"{self._place}: {error.strerror or error}"
        except Exception as error:  # else it would be lost with the thread
            self.problem = f"{self._place}: {type(error).__name__}: {error}"

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the thread, but no longer than that."""
        self._thread.join(seconds)


@dataclass
class _Save:
    """The save in flight. `work`: this rank's part of the phase; None where it has none (commit, but for rank 0)."""

    step: int
    temporary: Path
    target: Path
    manifest: Manifest
    work: _Work | None
    committing: bool = False


def _contents(files: Mapping[str, Path | None]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items() if path is not None}


class Saver:
    """The saves of one start of a run, under `root`. Every method is collective, apart from ``wishes``."""

    def __init__(
        self,
        root: Path,
        config: TrainingRun,
        mesh: Mesh,
        engine: Engine,
        tokenizer: Path,
        announce: Callable[[Path], None] = lambda folder: None,
        draft_tokens: Path | None = None,
    ) -> None:
        """`announce` is called on every rank with each checkpoint that has become complete. `draft_tokens`: the file of those of
        a run that has some, kept in each checkpoint as the tokenizer is."""
        self.announce, self.draft_tokens = announce, draft_tokens
        self.root, self.config, self.mesh, self.engine = root, config, mesh, engine
        # Read now: the dataset's folder may be gone when the last checkpoint is due.
        self.copied = {} if mesh.rank else _contents({TOKENIZER: tokenizer, DRAFT_TOKENS: draft_tokens})
        self.file = FragmentFile(f"rank_{mesh.rank:05d}.safetensors", engine, buffered=config.checkpoint.asynchronous)
        self._parameters: dict[str, ParameterRecord] | None = None
        self._save: _Save | None = None

    def begin(self, *, step: int, progress: dict[str, Any], data: dict[str, Any], tracker: dict[str, Any]) -> Path:
        """Start to write `root`/step_N; returns that path. Only rank 0's progress, data, tracker count.

        Waits for the save before it, and without ``checkpoint.asynchronous`` for this one. Raises AgreedError where either fails.
        """
        self.finish()
        if self._parameters is None:
            self._parameters = self._gathered()
        target = self.root / folders.name_of(step)
        temporary = self._attempt(target)
        if temporary is None:
            return target  # saved before, and nothing was trained since
        point("snapshot.before")
        if self.config.checkpoint.asynchronous:
            self.file.snapshot()
        point("snapshot.after")
        manifest = self._manifest(step, progress, data, tracker)
        self._save = _Save(step, temporary, target, manifest, _Work(lambda: self._write(temporary), temporary / self.file.name))
        if not self.config.checkpoint.asynchronous:
            self.finish()
        return target

    def wishes(self) -> list[bool]:
        """Whether this rank is still at work for a save, and whether it failed: for ``advance``, over all ranks."""
        work = self._save.work if self._save is not None else None
        return [work is not None and work.busy, work is not None and work.problem is not None]

    def advance(self, busy: bool, failed: bool) -> None:
        """Go on to the next phase where no rank is `busy`. Both as agreed on by all. Raises AgreedError where one failed."""
        if self._save is None or busy:
            return
        save = self._save
        if failed:
            self._save = None
            raise AgreedError(self._failure(save))
        if save.committing:
            self._save = None
            self.announce(save.target)
            return
        records: list[Any] | None = [None] * dist.get_world_size() if self.mesh.rank == 0 else None
        assert save.work is not None
        dist.gather_object((self.file.name, save.work.result), records, dst=0, group=self.mesh.control)
        save.committing, save.work = True, None
        if records is not None:
            save.manifest.files |= dict(records)
            save.work = _Work(lambda: self._commit(save), save.temporary)

    def finish(self) -> None:
        """Wait for the save in flight, if there is one. Raises AgreedError where it failed."""
        while self._save is not None:
            if self._save.work is not None:
                # Ranks whose part is done wait for this one in the exchange below, which must not time out.
                self._save.work.join(min(30.0, 15 * self.config.parallel.timeout_minutes))
            flags = torch.tensor(self.wishes(), dtype=torch.int32)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.mesh.control)
            self.advance(*(bool(flag) for flag in flags.tolist()))

    def clean(self) -> None:
        """Remove what unfinished saves of earlier starts left. Only while no other job has the run folder."""
        if self.mesh.rank == 0:
            folders.remove_leftovers(self.root)
        dist.barrier(group=self.mesh.control)

    # Parts of a save

    def _attempt(self, target: Path) -> Path | None:
        """The temporary folder that all ranks write into; None where the checkpoint exists."""
        if self.mesh.rank == 0 and target.exists() and not (target / MANIFEST).is_file():
            folders.set_aside(target)  # no checkpoint, whatever it is: it must not pass for this one
        name = [None if target.exists() else f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"] if self.mesh.rank == 0 else [None]
        dist.broadcast_object_list(name, src=0, group=self.mesh.control)
        return None if name[0] is None else self.root / name[0]

    def _gathered(self) -> dict[str, ParameterRecord]:
        """Where every rank's file holds which fragments, on rank 0: the same for all saves of a start."""
        everyone: list[Any] | None = [None] * dist.get_world_size() if self.mesh.rank == 0 else None
        dist.gather_object(self.file.fragments, everyone, dst=0, group=self.mesh.control)
        parameters: dict[str, ParameterRecord] = {}
        for fragments in everyone or []:
            for name, record in fragments:
                if name in parameters:
                    parameters[name].fragments += record.fragments
                else:
                    parameters[name] = record
        return parameters

    def _write(self, temporary: Path) -> FileRecord:
        point("write.before")
        temporary.mkdir(parents=True, exist_ok=True)
        return self.file.write(temporary)

    def _failure(self, save: _Save) -> str:
        """The message of a failed save, the same on all ranks; what it left is removed."""
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, save.work.problem if save.work is not None else None, group=self.mesh.control)
        if self.mesh.rank == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
        problem = next((entry for entry in problems if entry), None)
        if save.target.exists():  # renamed, then something failed
            return f"checkpoint of step {save.step} is written, but what follows failed: {problem}"
        return f"checkpoint of step {save.step} not written: {problem}; the last one before it is untouched"

    def _manifest(self, step: int, progress: dict[str, Any], data: dict[str, Any], tracker: dict[str, Any]) -> Manifest:
        config = self.config
        assert self._parameters is not None
        return Manifest(
            step=step,
            progress=progress,
            optimizer={
                "kind": "AdamW", "step": max(self.engine.optimizer_steps.values()), "steps": self.engine.optimizer_steps},
            contract=contract(config.mtp),
            layout={**asdict(config.parallel), "zero": config.zero.stage, "world": dist.get_world_size()},
            data=data,
            tracker=tracker,
            versions={"mtp_dist": mtp_dist.__version__, "torch": torch.__version__, "python": platform.python_version()},
            parameters=self._parameters,
            files={},
            format=self._format(),
        )

    def _format(self) -> str:
        mtp = self.config.mtp
        if owns_embeddings(mtp) or (owns_projections(mtp) and mtp.kind in OWN_EMBEDDING):
            return WITH_OWN_MATRICES
        return FORMAT if self.draft_tokens is None else WITH_DRAFT_TOKENS

    def _commit(self, save: _Save) -> None:
        """Rank 0, in its thread, when every file is on the disk and was read back."""
        point("commit.before")
        temporary, manifest = save.temporary, save.manifest
        compose.save(self.config, temporary / CONFIG)
        point("commit.files")
        for name, content in self.copied.items():
            (temporary / name).write_bytes(content)
        for name in (CONFIG, *self.copied):
            sync_path(temporary / name)
            manifest.files[name] = file_record(temporary / name)
        for name, record in manifest.files.items():
            # On a folder that nodes do not share, the others' files are not here.
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != record.size:
                raise OSError(f"{name} is not to be seen from rank 0; run_dir must be on a file system that all nodes share")
        manifest.write(temporary / MANIFEST)
        sync_path(temporary)
        point("rename.before")
        os.rename(temporary, save.target)
        point("rename.after")
        sync_path(self.root)
        folders.point_latest(self.root, save.target)
        point("latest.after")
        folders.require_whole(save.target)
        point("prune.before")
        folders.prune(self.root, self.config.checkpoint)
        point("prune.after")
