"""A model that the ranks of a layout decode together: each runs its chunks with caches of their own.

Every rank runs the same rounds on the same texts. A pass walks through the pipeline, hidden states travel from rank to rank; the
ranks of the last chunk make logits (each tensor rank those of its rows of the vocabulary, then all have all), and the first of
them decides: it draws the tokens and tells the others. Drafts of the model's own heads are made by all ranks of the last chunk,
others by the one that decides. Texts are those of one process up to rounding; no rank ever holds the whole model.

Contract: all ranks of a replica make the same calls in the same order, with the same prompts and settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config import layout
from mtp_dist.decoding.cache import Span
from mtp_dist.decoding.drafter import Drafter, Proposal
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Tree
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import spec_of
from mtp_dist.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class ModelPart:
    """What one rank holds of a model: its chunks, ascending, with their weights. `told`: the group of its replica's ranks, on the
    CPU, in which decisions travel."""

    chunks: nn.ModuleList
    mesh: Mesh
    told: dist.ProcessGroup

    @staticmethod
    def of(chunks: nn.ModuleList, mesh: Mesh) -> "ModelPart":
        """Collective over the world."""
        return ModelPart(chunks, mesh, mesh.replica_control())

    @property
    def depth(self) -> int:
        """D."""
        depth: int = self.chunks[0].depth  # type: ignore[assignment]
        return depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mesh.device

    @property
    def leader(self) -> int:
        """Global rank of the one that decides: of those of the last chunk the first."""
        parallel = self.mesh.parallel
        return self.mesh.rank_of(layout.rank_of_chunk(parallel, layout.chunks(parallel) - 1), 0)

    @property
    def leads(self) -> bool:
        """Whether this rank decides."""
        return self.mesh.rank == self.leader


def open_model(
    model: Chunk | ModelPart, capacity: int, *, end: int | None = None, vocabulary: int | None = None
) -> DecodingModel:
    """The decoder's view of a whole model or of this rank's part of one."""
    kind: type[DecodingModel] = LayoutModel if isinstance(model, ModelPart) else DecodingModel
    return kind(model, capacity, end=end, vocabulary=vocabulary)  # type: ignore[arg-type]


class LayoutModel(DecodingModel):
    """This rank's view. What is not its own to know (states of a rank without the last chunk) means nothing."""

    def __init__(self, part: ModelPart, capacity: int, *, end: int | None = None, vocabulary: int | None = None) -> None:
        super().__init__([chunk for chunk in part.chunks if isinstance(chunk, Chunk)], capacity, end=end, vocabulary=vocabulary)
        self.mesh, self.told, self.leader, self.leads = part.mesh, part.told, part.leader, part.leads
        self.numbers = layout.chunks_of_rank(part.mesh.parallel, part.mesh.pipeline_rank)

    def received(self, place: int, carried: Tensor | None, span: Span) -> Tensor:
        before = layout.rank_of_chunk(self.mesh.parallel, self.numbers[place] - 1)
        if before == self.mesh.pipeline_rank:
            assert carried is not None
            return carried
        chunk = self.chunks[place]
        shape = (len(span.begin), span.width, chunk.states_in * chunk.model.hidden)
        states = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(states, self.mesh.pipeline_peer(before), group=self.mesh.pipeline)
        return states

    def hand_on(self, place: int, states: Tensor) -> None:
        after = layout.rank_of_chunk(self.mesh.parallel, self.numbers[place] + 1)
        if after != self.mesh.pipeline_rank:
            dist.send(states.contiguous(), self.mesh.pipeline_peer(after), group=self.mesh.pipeline)

    def logits(self, states: Tensor, matrix: Tensor | None = None) -> Tensor:
        """As in one process, on each of the tensor ranks. Collective over them."""
        group = self.mesh.tensor
        if group.size == 1:
            return super().logits(states, matrix)
        rows = self.chunk.output_weight() if matrix is None else matrix
        spec = spec_of(rows)
        # Shares differ by a row, and a gather takes equal ones.
        gathered = group.stacked(F.pad(states @ rows.T, (0, spec.largest_share - len(rows))))
        bounds = [rank * spec.shape[0] // group.size for rank in range(group.size + 1)]
        shares = [share[..., : end - begin] for share, begin, end in zip(gathered, bounds, bounds[1:], strict=False)]
        logits = torch.cat(shares, dim=-1)[..., : self.vocabulary]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def draft_logits(self, states: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Tensor ranks have unequal parts of these tokens: they make all logits."""
        whole = self.mesh.tensor.size > 1 and self.drafted is not None
        return self.logits(states)[..., self.drafted] if whole else super().draft_logits(states, matrix)

    def decide(self, states: Tensor, rule: Callable[[Tensor], T]) -> T:
        logits = self.logits(states) if self.chunk.last else None
        return self.agreed(rule(logits) if self.leads and logits is not None else None)  # type: ignore[return-value]

    def agreed(self, value: T) -> T:
        told = [value if self.leads else None]
        dist.broadcast_object_list(told, self.leader, group=self.told)
        return told[0]  # type: ignore[return-value]

    def same(self, tokens: Tensor) -> Tensor:
        group = self.mesh.tensor
        if group.size > 1:
            tokens = tokens.contiguous()
            dist.broadcast(tokens, self.leader, group=group.process_group)
        return tokens


class Announced:
    """A drafter whose drafts all ranks of a replica learn. `inner`: it, on the ranks that draft."""

    def __init__(self, model: LayoutModel, inner: Drafter | None) -> None:
        self.model, self.inner = model, inner

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        if self.inner is not None:
            self.inner.prefill(texts, trunk)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        if self.inner is not None:
            self.inner.observe(texts, trunk)

    def propose(self, texts: Texts, count: int) -> Proposal | Tree:
        own = self.inner.propose(texts, count) if self.inner is not None else None
        kind, rows, counts = self.model.agreed(_told(own) if own is not None else (Proposal, [], None))
        if own is not None and (self.model.leads or kind is Proposal):
            return own
        parts = [texts.tokens.new_tensor(part) for part in rows]
        texts.branch(parts[0])
        return Tree(*parts) if kind is Tree else Proposal(parts[0], None, counts)

    def keep(self, rows: list[int]) -> None:
        if self.inner is not None:
            self.inner.keep(rows)

    def join(self, other: Self) -> None:
        if self.inner is not None:
            assert other.inner is not None
            self.inner.join(other.inner)


def _told(own: Proposal | Tree) -> tuple[type[Proposal | Tree], list[list[list[int]]], list[int] | None]:
    """What the other ranks learn of drafts: all but the distributions, which only the one that decides needs."""
    if isinstance(own, Tree):
        return Tree, [part.tolist() for part in (own.tokens, own.parents, own.depths)], None
    return Proposal, [own.tokens.tolist()], own.counts
