"""The chunks of this rank, built from the settings with this rank's slice of every parameter."""

from collections.abc import Sequence

import torch
from torch import nn

from mtp_dist.config import layout
from mtp_dist.config.schema import TrainingRun
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.embedding import Embedding
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.placement import layers_of_chunks


def build_chunks(config: TrainingRun, mesh: Mesh, draft_tokens: Sequence[int] | None = None) -> nn.ModuleList:
    """This rank's chunks on the meta device, ascending. In a V placement the first and the last share one embedding module.
    `draft_tokens`: as of ``Chunk``."""
    model, mtp, layers = config.model, config.mtp, layers_of_chunks(config)
    count = layout.chunks(mesh.parallel)
    embedding: Embedding | None = None
    chunks = nn.ModuleList()
    with torch.device("meta"):
        for number in layout.chunks_of_rank(mesh.parallel, mesh.pipeline_rank):
            chunk = Chunk(
                model, mtp, layers[number], first=number == 0, last=number == count - 1, group=mesh.tensor, embedding=embedding,
                draft_tokens=draft_tokens,
            )
            embedding = embedding or chunk.embedding
            chunks.append(chunk)
    return chunks


def global_parameters(chunks: nn.ModuleList) -> dict[str, nn.Parameter]:
    """Global name -> parameter of all chunks of this rank; a shared one appears once."""
    found: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        for name, p in chunk.named_parameters():
            found.setdefault(name, p)
    return found
