"""``train.trace``: one step of a start is recorded on all ranks, and rank 0 writes it."""

import socket
import sys
from pathlib import Path

import torch.distributed as dist

from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.timeline import Timeline
from mtp_dist.tracking import names
from mtp_dist.tracking.trace_file import Track, mean_bubble, on_one_clock, write_trace
from mtp_dist.training.step import Workload

WARM_UP = 2
"""Steps of a start before the recorded one: the first ones allocate, connect peers and choose kernels."""


class Trace:
    """Records step `first` + ``WARM_UP``, or the last one if there are fewer. `first`, `last`: steps of this start, from 1."""

    def __init__(self, folder: Path, mesh: Mesh, workload: Workload, first: int, last: int) -> None:
        self.folder, self.mesh, self.workload = folder, mesh, workload
        self.step = min(first + WARM_UP, last)
        self.timeline: Timeline | None = None
        self.aligned = 0

    def before(self, step: int) -> None:
        """Start to record if this step is the one. Collective."""
        if step != self.step:
            return
        dist.barrier(group=self.mesh.control)
        self.timeline = Timeline(self.mesh.device)
        self.aligned = self.timeline.began
        self.workload.record(self.timeline)

    def after(self, step: int) -> dict[str, float]:
        """Stop, write, and return the metrics of the recorded step; empty for any other. Collective."""
        if self.timeline is None:
            return {}
        mesh = self.mesh
        self.workload.record(None)
        track = Track(
            mesh.rank, mesh.pipeline_rank, mesh.data_rank, mesh.tensor.rank, _clock(), self.aligned, self.timeline.spans()
        )
        self.timeline = None
        tracks: list[Track] = [track] * dist.get_world_size()
        dist.all_gather_object(tracks, track, group=mesh.control)
        tracks = on_one_clock(tracks)
        if mesh.rank == 0:
            try:
                write_trace(self.folder, step, tracks)
            except OSError as error:
                print(f"warning: the trace of step {step} is not written: {self.folder}: {error.strerror}", file=sys.stderr)
        return {names.PIPELINE_BUBBLE: mean_bubble(tracks)}


def _clock() -> str:
    """Names the clock that ``time.perf_counter_ns`` reads: that of the running kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
