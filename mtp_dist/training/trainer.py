"""The training loop: read, step, agree, track, validate, save; from the newest checkpoint on, until the last step or a request to
stop."""

import contextlib
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.draft_tokens import drafted
from mtp_dist.checkpoint.manifest import DRAFT_TOKENS, TrackerRecord, damaged
from mtp_dist.checkpoint.writer import Saver
from mtp_dist.config.layout import micro_batches, tokens_per_step
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.prefetch import Batches, Prefetch
from mtp_dist.data.stream import State, StateError, merge_states, training_stream
from mtp_dist.errors import AgreedError, UserError
from mtp_dist.parallel.drawing import placement_drawing
from mtp_dist.parallel.engine import StepOutcome
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import METRICS_FILE
from mtp_dist.tracking.tracker import Tracker
from mtp_dist.training import status
from mtp_dist.training.agreement import disk_trouble, first_problem, raise_together, together
from mtp_dist.training.console import Console
from mtp_dist.training.held_out import HeldOut
from mtp_dist.training.learning_rate import learning_rate
from mtp_dist.training.nonfinite import keep_batch
from mtp_dist.training.objective import (
    coefficients,
    depth_in_force,
    draws,
    loss_weight,
    main_loss_weight,
    sampling_probability,
)
from mtp_dist.training.progress import Progress
from mtp_dist.training.resume import newest_sound, warm_start
from mtp_dist.training.sample import Sample, shown
from mtp_dist.training.signals import StopRequest
from mtp_dist.training.statistics import Totals
from mtp_dist.training.step import Workload, build
from mtp_dist.training.trace import Trace


class Clock:
    """Due every so many steps, or minutes, since it last was."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.seconds, self.since = steps, minutes * 60, time.monotonic()

    def due(self, step: int) -> bool:
        """Rank 0 decides and tells the others: their clocks differ."""
        late = self.seconds > 0 and time.monotonic() - self.since >= self.seconds
        return late or (self.steps > 0 and step % self.steps == 0)

    def restart(self) -> None:
        self.since = time.monotonic()


class Trainer:
    """One start of a run on one rank. Every method is collective."""

    def __init__(self, config: TrainingRun, mesh: Mesh, stop: StopRequest) -> None:
        assert config.train.steps is not None
        self.config, self.mesh, self.stop = config, mesh, stop
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.total = config.train.steps
        self.step_tokens = tokens_per_step(config)
        self.progress = Progress()
        self.data_state: State | None = None
        self.saved_step = -1
        self.saving = 0.0  # seconds that no record has yet
        self.dataset = Dataset.open(config.data.path)
        self.draft_tokens = together(mesh, lambda: drafted(config))
        self.workload: Workload = build(config, mesh, self.draft_tokens)
        run_id = self._resume()
        tokenizer = self.dataset.tokenizer_path
        listed = None if self.draft_tokens is None else self.run_dir / DRAFT_TOKENS
        self.saver = Saver(self.checkpoints, config, mesh, self.workload.engine, tokenizer, self._saved, listed)
        self.saver.clean()
        self.data_end: State | None = None
        self.source = together(mesh, self._open_stream)
        self.upcoming: tuple[Batch, State] | None = None
        self.problem: str | None = None
        self.held_out = self._open_held_out()
        self.sample = self._open_sample()
        leader = mesh.rank == 0
        self.console = Console(self.total, self.progress.step, on=leader and config.train.progress)
        self.tracker = together(
            mesh,
            lambda: Tracker(
                self.run_dir, config.tracker, settings=asdict(config), run_id=run_id, resume_step=self.progress.step, on=leader
            ),
        )
        first = self.progress.step + 1
        traced = config.train.trace and first <= self.total
        self.trace = Trace(self.run_dir / "trace", mesh, self.workload, first, self.total) if traced else None
        self.log_clock = Clock(config.train.log_every_steps, config.train.log_every_minutes)
        self.validation_clock = Clock(config.validation.every_steps, config.validation.every_minutes)
        self.save_clock = Clock(config.checkpoint.every_steps, config.checkpoint.every_minutes)

    # Start

    def _resume(self) -> str | None:
        """Load the newest sound checkpoint if there is one, else what the run starts from; returns the tracker's run id."""
        checkpoint = newest_sound(self.checkpoints, self.mesh)
        if checkpoint is None:
            if self.config.init.checkpoint:
                said = warm_start(self.config, self.mesh, self.workload.engine)
                if self.mesh.rank == 0 and self.config.train.progress:
                    print(said, flush=True)
            return None
        if checkpoint.draft_tokens != self.draft_tokens:
            raise AgreedError(
                f"{self.run_dir / DRAFT_TOKENS} holds other tokens than {checkpoint.path} was trained with; copy the checkpoint's"
            )
        checkpoint.load_engine(self.workload.engine)
        checkpoint.load_random_state(self.mesh.rank, self.mesh.device)
        self.progress = checkpoint.section("progress", Progress)
        self.data_state = checkpoint.manifest.data
        self.saved_step = checkpoint.step
        if self.mesh.rank == 0 and self.config.train.progress:
            print(f"resumed from {checkpoint.path} at step {checkpoint.step}", flush=True)
        return checkpoint.section("tracker", TrackerRecord).run_id

    def _open_stream(self) -> Batches | None:
        if not self.mesh.is_reader:
            return None
        config = self.config
        try:
            stream = training_stream(self.dataset, config, self.mesh.data_rank, config.parallel.data, self.data_state)
        except StateError as error:
            raise damaged(self.checkpoints / folder.name_of(self.saved_step), f"data.{error.what}") from None
        self.data_end = stream.state
        return Prefetch(stream, config.data.prefetch) if config.data.prefetch else stream

    def _open_held_out(self) -> HeldOut | None:
        split = self.dataset.splits.get("validation")
        if split is None or split.documents == 0 or self.config.validation.sequences == 0:
            return None
        return HeldOut(self.workload, self.dataset, "validation", self.config.validation.sequences)

    def _open_sample(self) -> Sample | None:
        if not self.config.validation.prompt:
            return None
        try:
            return Sample(self.config, self.mesh, self.workload.pipeline.chunks, self.dataset.tokenizer_path)
        except UserError as error:
            raise AgreedError(str(error)) from None

    # The loop

    def run(self) -> str:
        """Train until the last step or a request to stop; returns the final ``status`` state."""
        try:
            self._mark(status.RUNNING)
            return self._train()
        except BaseException as error:
            if isinstance(error, AgreedError):  # every rank is here, so all can end the save in flight
                try:
                    self.saver.finish()
                except AgreedError as problem:
                    self.console.say(f"warning: {problem}")
            if self.mesh.rank == 0:
                with contextlib.suppress(OSError):  # a full disk may be the reason
                    self._write_status(status.FAILED)
            raise

    def _train(self) -> str:
        self.console.say(placement_drawing(self.config, self.workload.attention))
        stopped = self._asked_before()
        if self.progress.step < self.total and not stopped:
            self._read()
            raise_together(self.mesh, self.problem)
        while self.progress.step < self.total and not stopped:
            stopped = self._one_step()
        self._save_at_end()
        state = status.STOPPED if stopped and self.progress.step < self.total else status.FINISHED
        self._mark(state)
        return state

    def _asked_before(self) -> bool:
        """Whether any rank was asked to stop while it started. Collective."""
        asked = torch.tensor(int(self.stop.asked), dtype=torch.int32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.mesh.control)
        return bool(asked)

    def _save_at_end(self) -> None:
        """Save what is not saved. Raises AgreedError with what ended the training, if a problem did, before any trouble of the
        save."""
        problem = first_problem(self.mesh, self.problem)
        try:
            if self.progress.step not in (0, self.saved_step):
                self.save()
            self.saver.finish()
        except AgreedError as error:
            raise AgreedError(f"{problem}; {error}" if problem else str(error)) from None
        if problem:
            raise AgreedError(problem)

    def _one_step(self) -> bool:
        """Returns whether all ranks agreed to stop after it."""
        if self.trace is not None:
            self.trace.before(self.progress.step + 1)
        began = time.perf_counter()
        batch, following = self.upcoming or (None, None)
        trained = self.progress.tokens_trained
        lr = learning_rate(self.config.schedule, self.config.optim.lr, trained + self.step_tokens, self.total * self.step_tokens)
        drawn = draws(self.config, self.progress.step, trained)
        totals, outcome = self.workload.step(batch, coefficients(self.config.mtp, trained), lr, drawn)
        if not outcome.applied:
            self._on_nonfinite(batch, totals, outcome)
        self.progress.advance(self.step_tokens, applied=outcome.applied)
        self.data_end = following  # None but on readers
        waited = self._read() if self.progress.step < self.total else 0.0
        elapsed = time.perf_counter() - began
        stop, log, validate, keep = self._agree()
        metrics: dict[str, float] = {}
        if log:
            metrics = self._metrics(totals, outcome, lr, trained, elapsed, waited)
        if self.trace is not None:
            metrics |= self.trace.after(self.progress.step)
        if validate:
            metrics |= self._validated()
        if metrics:
            self._track(metrics)
        self.console.step(self.progress.step, metrics)
        if keep and not stop:
            self.save()
        return stop

    def _validated(self) -> dict[str, float]:
        """``validate``, where held-out rows can be read; else all ranks know why, and save and end after the next step."""
        try:
            return self.validate()
        except AgreedError as error:
            self.problem = self.problem or str(error)
            return {}

    def _track(self, metrics: dict[str, float]) -> None:
        """Write the metrics down. Where the disk refuses, all ranks hear of it after the next step, save and end."""
        try:
            self.tracker.log(self.progress.step, metrics)
        except OSError as error:
            self.problem = self.problem or disk_trouble(error, self.run_dir / METRICS_FILE)

    def _read(self) -> float:
        """Fetch the next step's rows, ahead of it: a reader's trouble must reach the others before they wait for its rows.
        Returns the seconds that it took."""
        began = time.perf_counter()
        try:
            self.upcoming = self.source.next() if self.source is not None else None
        except UserError as error:
            self.problem = self.problem or str(error)
        except OSError as error:
            self.problem = self.problem or disk_trouble(error)
        return time.perf_counter() - began

    def _agree(self) -> tuple[bool, bool, bool, bool]:
        """What every rank does after this step: stop (any rank was asked to, or cannot go on), log, validate, save (rank 0's
        clocks). A save in flight goes on; raises AgreedError where it has failed."""
        step, last, leader = self.progress.step, self.progress.step == self.total, self.mesh.rank == 0
        wishes = [
            self.stop.asked or self.problem is not None,
            leader and (last or self.log_clock.due(step)),
            leader and (last or self.validation_clock.due(step)) and self.held_out is not None,
            leader and self.save_clock.due(step),
        ]
        flags = torch.tensor([*wishes, *self.saver.wishes()], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.mesh.control)
        stop, log, validate, keep, saving, failed = (bool(flag) for flag in flags.tolist())
        self.saver.advance(saving, failed)
        for clock, due in ((self.log_clock, log), (self.validation_clock, validate), (self.save_clock, keep)):
            if due:
                clock.restart()
        return stop, log, validate, keep

    def _on_nonfinite(self, batch: Batch | None, totals: Totals, outcome: StepOutcome) -> None:
        """Keep the rows; raise AgreedError on all ranks where the policy says stop. The step left the weights as they were."""
        step, train = self.progress.step + 1, self.config.train
        if batch is not None:
            with contextlib.suppress(OSError, SafetensorError):  # rows kept for a look are no reason to end otherwise than said
                keep_batch(self.run_dir, step, self.mesh.data_rank, batch, totals, outcome)
        where = self.run_dir / "nonfinite" / f"step_{step:08d}"
        what = (
            f"step {step}: loss {totals.loss}, gradient norm {outcome.gradient_norm}; weights unchanged, its rows are in {where}"
        )
        if train.nonfinite == "skip" and self.progress.skipped_in_row < train.nonfinite_limit:
            self.console.say(f"warning: {what}; skipped (train.nonfinite=skip)")
            return
        if self.progress.step != self.saved_step:
            self.save()
        if train.nonfinite == "skip":
            row = self.progress.skipped_in_row + 1
            raise AgreedError(f"{what}; {row} such steps in a row exceed train.nonfinite_limit={train.nonfinite_limit}")
        raise AgreedError(f"{what}; lower optim.lr, or set train.nonfinite=skip to go on without such steps")

    def _metrics(
        self, totals: Totals, outcome: StepOutcome, lr: float, trained: int, elapsed: float, waited: float
    ) -> dict[str, float]:
        seen = self.progress.tokens_seen
        metrics = totals.training_metrics() | {
            names.LEARNING_RATE: lr,
            names.GRADIENT_NORM: outcome.gradient_norm,
            names.SKIPPED_STEPS: self.progress.skipped,
            names.MAIN_LOSS_WEIGHT: main_loss_weight(self.config.mtp, trained),
            names.LOSS_WEIGHT: loss_weight(self.config.mtp, trained),
            names.SCHEDULED_SAMPLING: sampling_probability(self.config.mtp, trained),
            names.DEPTH_IN_FORCE: depth_in_force(self.config.mtp, trained),
            names.TOKENS_SEEN: seen,
            names.EPOCH: seen / self.dataset.splits["train"].tokens,
            names.TOKENS_PER_SECOND: self.step_tokens / elapsed,
            names.STEP_TIME: elapsed,
            names.DATA_WAIT: waited,
            **dict(zip((names.FORWARD_BACKWARD_TIME, names.OPTIMIZER_TIME), self.workload.clock.seconds(), strict=True)),
            names.MEMORY_RSS: psutil.Process().memory_info().rss / 2**30,
        }
        if self.mesh.device.type == "cuda":
            metrics[names.MEMORY_DEVICE_PEAK] = torch.cuda.max_memory_allocated() / 2**30
        if self.saving:
            metrics[names.SAVE_TIME], self.saving = self.saving, 0.0
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out rows, and of a text that the model continues."""
        assert self.held_out is not None
        began = time.perf_counter()
        totals = self.held_out.run(self.config.train.micro_batch, micro_batches(self.config))
        metrics = totals.validation_metrics(coefficients(self.config.mtp, self.progress.tokens_trained))
        self.console.validation(self.progress.step, metrics)
        if self.sample is not None:
            text, found = self.sample.write(self.progress.step)
            self.console.say(f"sample at step {self.progress.step}: {shown(self.sample.prompt, text)}")
            metrics |= found
        return metrics | {names.VALIDATION_TIME: time.perf_counter() - began}

    def save(self) -> None:
        """Begin a checkpoint of the step that was last applied."""
        began = time.perf_counter()
        drift = self.workload.engine.replica_drift()
        raise_together(self.mesh, f"the copies of the embedding differ by {drift}; nothing was saved" if drift else None)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.data_end, group=self.mesh.control)
        self.saver.begin(
            step=self.progress.step,
            progress=asdict(self.progress),
            data=merge_states([state for state in states if state is not None]),
            tracker={"run_id": self.tracker.run_id},
        )
        self.saved_step = self.progress.step
        self.saving += time.perf_counter() - began

    def _saved(self, folder: Path) -> None:
        self.console.say(f"saved {folder}")

    # End

    def _mark(self, state: str) -> None:
        """Collective."""
        together(self.mesh, lambda: self._write_status(state) if self.mesh.rank == 0 else None)

    def _write_status(self, state: str) -> None:
        status.write_status(self.run_dir, state, self.progress.step, total=self.total)

    def close(self) -> None:
        if self.source is not None:
            self.source.close()
        with contextlib.suppress(OSError):  # what was logged is in the file, or its loss was said
            self.tracker.close()
        self.console.close()


def make_deterministic(device: torch.device) -> None:
    """The same bits for the same work: deterministic kernels. On CUDA a kernel without a deterministic variant warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
