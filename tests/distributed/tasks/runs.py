"""Whole runs under a layout: trained, stopped, handed on, evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtp_dist.checkpoint import draft_tokens
from mtp_dist.config.schema import Evaluation, ParallelConfig, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.parallel.mesh import build_mesh
from tests.distributed.layouts import configuration


class Stop:
    """A request to stop that comes after a given step, instead of a signal."""

    def __init__(self, trainer_step: Any = None, at: int | None = None) -> None:
        self.trainer_step, self.at = trainer_step, at

    @property
    def asked(self) -> bool:
        return self.at is not None and self.trainer_step() >= self.at


def train_once(config: TrainingRun, stop_at: int | None = None) -> None:
    from mtp_dist.training.trainer import Trainer

    if dist.get_rank() == 0:
        draft_tokens.choose(config)  # as ``freeze`` does
    dist.barrier()
    trainer: Any = None
    stop = Stop(lambda: trainer.progress.step, stop_at)
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu")), stop)  # type: ignore[arg-type]
    try:
        trainer.run()
    finally:
        trainer.close()


def settings_of_run(layout: str, data: str, run_dir: str, steps: int, overrides: dict[str, Any]) -> TrainingRun:
    config = configuration(layout, steps=steps, progress=False)
    config.run_dir, config.data.path, config.tracker.wandb = run_dir, data, "disabled"
    config.model.vocab_size = 265  # the byte tokenizer has 257; tensor ranks have unequal shares
    config.data.block_samples, config.validation.sequences = 4, 5
    config.train.dtype = "float32" if config.zero.stage == 0 else "bfloat16"
    config.schedule.kind, config.schedule.warmup_tokens = "cosine", 2 * 16 * 16
    for key, value in overrides.items():
        part, name = key.split(".")
        setattr(getattr(config, part), name, value)
    return config


def train(layout: str, data: str, run_dir: str, steps: int, stops: list[int], overrides: dict[str, Any]) -> None:
    """Train in `run_dir` to `steps`, stopping (with a checkpoint) after each step of `stops` and starting again from it."""
    for stop in [*stops, None]:
        train_once(settings_of_run(layout, data, run_dir, steps, overrides), stop)


def evaluate(checkpoint: str, parallel: dict[str, Any], sequences: int, micro_batch: int, output: str) -> dict[str, Any]:
    """A checkpoint's held-out result under a layout."""
    from mtp_dist.evaluate import measure, prepare

    config = Evaluation(checkpoint=checkpoint, sequences=sequences, micro_batch=micro_batch, dtype="float32", output=output)
    config.parallel = ParallelConfig(**parallel)
    ready = prepare(config)
    return measure(ready, build_mesh(ready.parallel, torch.device("cpu")))


def copy(run_dir: str) -> None:
    """A run folder as it is now, kept as <run_dir>-look for a test, since a later job goes on in it."""
    if dist.get_rank() == 0:
        shutil.copytree(run_dir, f"{run_dir}-look")
    dist.barrier()


def trouble(
    layout: str, data: str, run_dir: str, steps: int, overrides: dict[str, Any], read_fails_at: int | None = None
) -> str | None:
    """Train; returns the message of the error that this rank raised. `read_fails_at`: one reader cannot read that step's rows."""
    from mtp_dist.data.stream import Stream

    read, count = Stream.next, 0

    def next_rows(self: Stream) -> Any:
        nonlocal count
        count += 1
        if count == read_fails_at and dist.get_rank() == 0:
            raise UserError("shard lost")
        return read(self)

    Stream.next = next_rows  # type: ignore[method-assign]
    try:
        train_once(settings_of_run(layout, data, run_dir, steps, overrides))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Stream.next = read  # type: ignore[method-assign]
    return None


def relay(layouts: list[str], data: str, run_dir: str, overrides: dict[str, Any]) -> None:
    """One run of as many steps as layouts, each step trained under another layout from the checkpoint of the one before."""
    for step, layout in enumerate(layouts, start=1):
        train_once(settings_of_run(layout, data, run_dir, len(layouts), overrides), step)


def background_save(data: str, run_dir: str, asynchronous: bool) -> dict[str, Any]:
    """Five steps, saved after the second, fourth and last. Asynchronous: the first file is not written before the third step has
    been trained. Returns the steps that were trained before any checkpoint was complete, and whether two saves ever met."""
    import threading

    from mtp_dist.checkpoint import folder
    from mtp_dist.checkpoint.fragment_file import FragmentFile
    from mtp_dist.training.trainer import Trainer

    write, one_step = FragmentFile.write, Trainer._one_step
    released, trained, writing, met = threading.Event(), [], [0], [False]

    def slow_write(self: FragmentFile, temporary: Path) -> Any:
        writing[0] += 1
        met[0] |= writing[0] > 1
        if asynchronous and not released.wait(60):
            raise OSError("never released")
        record = write(self, temporary)
        writing[0] -= 1
        return record

    def step(self: Trainer) -> bool:
        stop = one_step(self)
        if not folder.complete(Path(run_dir) / "checkpoints"):
            trained.append(self.progress.step)
        if self.progress.step == 3:
            released.set()
        return stop

    FragmentFile.write, Trainer._one_step = slow_write, step  # type: ignore[method-assign]
    try:
        saving = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 0, "checkpoint.asynchronous": asynchronous}
        train_once(settings_of_run("pp2_1f1b", data, run_dir, 5, saving))
    finally:
        FragmentFile.write, Trainer._one_step = write, one_step  # type: ignore[method-assign]
    return {"trained": trained, "met": met[0]}


def start_from(layout: str, data: str, run_dir: str, depth: int, seed: int, overrides: dict[str, Any]) -> None:
    """A new run from another's weights, saved before its first step (as step 0), then trained for two."""
    from mtp_dist.training.trainer import Trainer

    settings = settings_of_run(layout, data, run_dir, 2, overrides)
    settings.mtp.depth, settings.mtp.kind = depth, settings.mtp.kind if depth else "none"
    settings.mtp.depth_weights, settings.seed = [], seed
    trainer = Trainer(settings, build_mesh(settings.parallel, torch.device("cpu")), Stop())  # type: ignore[arg-type]
    try:
        trainer.save()
        trainer.run()
    finally:
        trainer.close()


def relist(run_dir: str) -> None:
    """Other tokens to draft among than the run's checkpoints know."""
    if dist.get_rank() == 0:
        path = Path(run_dir) / draft_tokens.DRAFT_TOKENS
        path.write_text(json.dumps([token + 100 for token in range(len(json.loads(path.read_text())))]))
    dist.barrier()
