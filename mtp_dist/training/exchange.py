"""The prologue's communication: one reader for each pipeline, its rows broadcast to the ranks of the replica, counts summed over
replicas."""

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.config.heads import learns_inside, lookahead
from mtp_dist.config.schema import MTPConfig
from mtp_dist.data.batch import Batch
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.parallel.mesh import Mesh


def share(batch: Batch | None, shape: tuple[int, int], mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The reader's batch on every rank of its replica: (tokens int64, documents int32), each of `shape` [rows, tokens of a
    row], on the device."""
    both = torch.empty(2, *shape, dtype=torch.int32, device=mesh.device)
    if mesh.is_reader:
        assert batch is not None
        both.copy_(torch.stack((batch.tokens.int(), batch.documents)))
    if mesh.parallel.pipeline * mesh.parallel.tensor > 1:
        dist.broadcast(both, mesh.reader, group=mesh.one_replica)
    return both[0].long(), both[1]


def global_counts(tokens: Tensor, documents: Tensor, mtp: MTPConfig, mesh: Mesh) -> Tensor:
    """int64 [1+D]: valid targets of each depth over all replicas."""
    inside, ahead = learns_inside(mtp), lookahead(mtp)
    counts = valid_counts(targets(tokens, documents, mtp.depth, stride=mtp.stride, inside=inside, ahead=ahead))
    if mesh.parallel.data > 1:
        dist.all_reduce(counts, group=mesh.replicas)
    return counts
