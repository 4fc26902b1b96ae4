"""The mesh: where this process stands among pipeline x data x tensor ranks, and the process groups it talks in.

Tensor ranks are neighbours (the same node), pipeline ranks are farthest apart. DeepSpeed's own topology makes the groups, so that
its ZeRO and ours agree on them.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mtp_dist.config.layout import is_v
from mtp_dist.config.schema import ParallelConfig
from mtp_dist.model.tensor_group import ALONE, TensorGroup


@dataclass(frozen=True)
class Mesh:
    """Ranks and groups of one process. `grid` is what DeepSpeed calls the model-parallel unit."""

    parallel: ParallelConfig
    device: torch.device
    pipeline_rank: int
    data_rank: int
    pipeline: dist.ProcessGroup
    replicas: dist.ProcessGroup
    one_replica: dist.ProcessGroup
    tied: dist.ProcessGroup | None
    tensor: TensorGroup
    control: dist.ProcessGroup
    grid: Any

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_reader(self) -> bool:
        """The one rank of each replica that reads data."""
        return self.pipeline_rank == 0 and self.tensor.rank == 0

    @property
    def reader(self) -> int:
        """Global rank of this replica's reader."""
        return self.grid._topo.get_rank(pipe=0, data=self.data_rank, model=0)

    def pipeline_peer(self, pipeline_rank: int) -> int:
        """Global rank of another pipeline rank of the same replica and tensor rank."""
        return self.rank_of(pipeline_rank, self.tensor.rank)

    def rank_of(self, pipeline_rank: int, tensor_rank: int) -> int:
        """Global rank of a place in the same replica."""
        return self.grid._topo.get_rank(pipe=pipeline_rank, data=self.data_rank, model=tensor_rank)

    def sharers(self, count: int) -> dist.ProcessGroup:
        """The `count` neighbouring tensor ranks, this one among them, that hold the same slice of a parameter (see
        ``ParameterSpec.sharers``). Collective over the world."""
        neighbours = torch.arange(dist.get_world_size()).view(-1, count)  # tensor ranks are neighbours, and count divides them
        own = _own_group(neighbours.tolist())
        assert own is not None
        return own

    def replica_control(self) -> dist.ProcessGroup:
        """As ``control``, of this replica's ranks alone. Collective over the world."""
        parallel, topology = self.parallel, self.grid._topo
        if parallel.data == 1:
            return self.control
        own = _own_group(
            (
                [topology.get_rank(pipe=p, data=d, model=t) for p in range(parallel.pipeline) for t in range(parallel.tensor)]
                for d in range(parallel.data)
            ),
            backend="gloo",
        )
        assert own is not None
        return own


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, on the accelerator that the launcher chose, without its just-in-time compiled CPU communication
    (65 s of compiler, and it needs one)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # New names of collectives, which torch 2.11 has not yet; DeepSpeed calls them by the old ones, too.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def choose_device(wanted: str) -> torch.device:
    """`launch.device`: auto takes this process's GPU if there is one."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def connect(device: torch.device, timeout_minutes: float) -> None:
    """Join the other processes; harmless when already joined."""
    deepspeed = import_deepspeed()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    # What groups get that are made without one, DeepSpeed's among them.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """Make every group of the layout; collective over all ranks of the world."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=parallel.pipeline, num_mp=parallel.tensor, num_dp=parallel.data)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the topology on every rank
        grid = PipelineParallelGrid(topology=topology)
    here = topology.get_coord(dist.get_rank())
    pipes = _own_group(
        [topology.get_rank(pipe=p, data=d, model=t) for p in range(parallel.pipeline)]
        for d in range(parallel.data)
        for t in range(parallel.tensor)
    )
    tensors = _own_group(
        [topology.get_rank(pipe=p, data=d, model=t) for t in range(parallel.tensor)]
        for p in range(parallel.pipeline)
        for d in range(parallel.data)
    )
    replica = _own_group(
        [topology.get_rank(pipe=p, data=d, model=t) for p in range(parallel.pipeline) for t in range(parallel.tensor)]
        for d in range(parallel.data)
    )
    tied = None
    if parallel.pipeline > 1 and not is_v(parallel):
        ends = (0, parallel.pipeline - 1)
        tied = _own_group(
            [topology.get_rank(pipe=p, data=d, model=t) for p in ends]
            for d in range(parallel.data)
            for t in range(parallel.tensor)
        )
        tied = tied if here.pipe in ends else None
    control = dist.new_group(backend="gloo")
    assert pipes is not None
    assert replica is not None
    return Mesh(
        parallel,
        device,
        here.pipe,
        here.data,
        pipes,
        grid.get_data_parallel_group(),
        replica,
        tied,
        TensorGroup(here.model, parallel.tensor, tensors, parallel.sequence_parallel) if parallel.tensor > 1 else ALONE,
        control,
        grid,
    )


def _own_group(groups: Any, backend: str | None = None) -> dist.ProcessGroup | None:
    """Create every group (all ranks must take part), return the one that this rank is in."""
    own = None
    for ranks in groups:
        made = dist.new_group(ranks, backend=backend)
        own = made if dist.get_rank() in ranks else own
    return own


def disconnect() -> None:
    """Leave in step with the others; without it a fast rank's exit looks like a failure to slow ones."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
