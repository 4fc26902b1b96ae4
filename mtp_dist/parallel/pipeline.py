"""One step's forward and backward passes through the pipeline, and the forward-only walk that evaluates.

The schedules are torch's (``torch.distributed.pipelining``), driving plain chunks. Three things are fixed here because each was
silent when wrong: stages get static shapes (else torch runs every chunk on garbage to infer them, and deferred weight gradients
leak in); gradients are not rescaled by the schedule (the loss is already normalised by global counts); weight gradients go
through ``dw_builder`` (torch's own split of backward fails where the shared embedding reaches the loss by several paths).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from mtp_dist.config import layout
from mtp_dist.model.weight_gradients import WeightGradients
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.schedules import SCHEDULES
from mtp_dist.parallel.timeline import SCHEDULE, Timeline, span, watched


class Pipeline:
    """Runs the chunks of this rank in concert with the other pipeline ranks.

    `chunks` accept (hidden, **rows) with rows split along dimension 0 into micro-batches, and return hidden [B, S, d], the last
    chunk a vector whose element 0 is the loss to differentiate.
    """

    def __init__(
        self,
        chunks: nn.ModuleList,
        mesh: Mesh,
        micro_batches: int,
        edge: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        frozen_trunk: bool = False,
    ) -> None:
        """`edge`: shape [B, S, d] of one state that travels between chunks, in `dtype`; chunks say how many travel side by side.
        `frozen_trunk`: only the last chunk has anything to learn, so no gradient travels and the pipeline has no schedule:
        micro-batches walk forward, and the last chunk alone runs backward."""
        self.chunks, self.mesh, self.micro_batches, self.edge, self.dtype = chunks, mesh, micro_batches, edge, dtype
        self.numbers = layout.chunks_of_rank(mesh.parallel, mesh.pipeline_rank)
        self.count = layout.chunks(mesh.parallel)
        # One queue for all chunks of the rank: they may share the embedding, and torch takes it right after each backward.
        self.queue = WeightGradients()
        self.forward: Callable[..., Tensor] = chunks[0]
        self.backward: Callable[[Tensor, bool], None] = self._backward
        for chunk in chunks:
            chunk.defer_weight_gradients(self.queue)  # type: ignore[operator]
        self.results: list[Tensor] = []
        self.timeline: Timeline | None = None
        self.stages: list[PipelineStage] = []
        self.schedule = self._build_schedule() if self.count > 1 and not frozen_trunk else None

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.count - 1 in self.numbers

    def _shape(self, states: int) -> tuple[int, int, int]:
        """Of so many states side by side."""
        return (*self.edge[:2], states * self.edge[2])

    def _build_schedule(self) -> Any:
        mesh = self.mesh

        def edge(states: int) -> Tensor:
            return torch.empty(self._shape(states), dtype=self.dtype, device=mesh.device, requires_grad=True)

        stages = self.stages
        for chunk, number in zip(self.chunks, self.numbers, strict=True):
            last = number == self.count - 1
            loss = torch.empty(chunk.result_size(), device=mesh.device) if last else None  # type: ignore[operator]
            stages.append(
                PipelineStage(
                    chunk,
                    number,
                    self.count,
                    mesh.device,
                    group=mesh.pipeline,
                    dw_builder=self.queue.take,
                    input_args=() if number == 0 else edge(chunk.states_in),  # type: ignore[arg-type]
                    output_args=edge(chunk.states_out) if loss is None else loss,  # type: ignore[arg-type]
                )
            )
        kind = SCHEDULES[mesh.parallel.schedule]
        return kind(stages if len(stages) > 1 else stages[0], self.micro_batches, self._collect, scale_grads=False)

    def _collect(self, result: Tensor, _target: Tensor) -> Tensor:
        self.results.append(result.detach())
        return result[0]

    def leave_passes_to(self, forward: Callable[..., Tensor], backward: Callable[[Tensor, bool], None]) -> None:
        """For an optimizer that shards gradients during each backward pass: it runs `forward(**rows)` and `backward(loss, last)`
        of a micro-batch itself, and autograd forms the weight gradients. Only without a pipeline."""
        assert self.count == 1
        self.forward, self.backward = forward, backward
        for chunk in self.chunks:
            chunk.defer_weight_gradients(None)  # type: ignore[operator]

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        self.queue.take()()

    def step(self, rows: dict[str, Tensor]) -> Tensor | None:
        """Forward and backward of all micro-batches; gradients are added to the parameters.

        rows: tensors [rows of this replica, ..], the same on every rank of the replica. Returns the sum of the last chunk's
        results over micro-batches where this rank holds it, else None.
        """
        self.results = []
        if self.count == 1:
            for i, part in enumerate(_split(rows, self.micro_batches)):
                with span(self.timeline, "F", 0, i):
                    loss = self._collect(self.forward(**part), part["tokens"])
                with span(self.timeline, "B", 0, i):
                    self.backward(loss, i == self.micro_batches - 1)
        elif self.schedule is None:
            with span(self.timeline, SCHEDULE):
                self.results = self._walk_all(rows, self.micro_batches, learn=True)
        else:
            target = {"target": rows["tokens"]} if self.has_last else {}
            with watched(self.timeline, self.stages):
                self.schedule.step(**rows, **target, return_outputs=False)
        return torch.stack(self.results).sum(0) if self.has_last else None

    @torch.no_grad()
    def evaluate(self, rows: dict[str, Tensor], micro_batches: int) -> Tensor | None:
        """Forward only: every chunk of this rank in ascending order over all micro-batches, sends not waited for until the end.
        Where chunks go round the ranks more than once in one direction (interleaved), micro-batches go one by one: a rank's
        sends to the next one would else stand before the receives that the ring needs, and NCCL keeps that order.

        The V schedules of torch cannot evaluate. No gradient, optimizer or random state is touched. Returns as ``step``.
        """
        results = self._walk_all(rows, micro_batches, learn=False)
        return torch.stack(results).sum(0) if results else None

    def _walk_all(self, rows: dict[str, Tensor], micro_batches: int, *, learn: bool) -> list[Tensor]:
        """The last chunk's results, where this rank holds it. `learn`: it runs backward after each forward pass."""
        parts = list(enumerate(_split(rows, micro_batches)))
        ring = len(self.numbers) > 1 and not layout.is_v(self.mesh.parallel)
        return [out for turn in ([[part] for part in parts] if ring else [parts]) for out in self._walk(turn, learn)]

    def _walk(self, parts: list[tuple[int, dict[str, Tensor]]], learn: bool) -> list[Tensor]:
        """`_walk_all` for these micro-batches, each with its number."""
        rows = parts[0][1]["tokens"].shape[0]
        timeline = self.timeline if learn else None
        sending: list[tuple[dist.Work | None, Tensor]] = []
        carried: list[Tensor] = []
        results: list[Tensor] = []
        for chunk, number in zip(self.chunks, self.numbers, strict=True):
            before = layout.rank_of_chunk(self.mesh.parallel, number - 1) if number > 0 else None
            after = layout.rank_of_chunk(self.mesh.parallel, number + 1) if number + 1 < self.count else None
            handed, carried = carried, []
            for position, (i, part) in enumerate(parts):
                hidden = None
                if before is not None and before == self.mesh.pipeline_rank:
                    hidden = handed[position]
                elif before is not None:
                    shape = (rows, *self._shape(chunk.states_in)[1:])  # type: ignore[arg-type]
                    hidden = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
                    dist.recv(hidden, self.mesh.pipeline_peer(before), group=self.mesh.pipeline)
                with (
                    torch.set_grad_enabled(learn and after is None),
                    span(timeline, "F", number, i, before not in (None, self.mesh.pipeline_rank)),
                ):
                    out = chunk(hidden, **part)
                if after is None and learn:
                    with span(timeline, "B", number, i):
                        out[0].backward()
                        self.queue.take()()
                if after is None:
                    results.append(out.detach())
                elif after == self.mesh.pipeline_rank:
                    carried.append(out)
                else:
                    out = out.contiguous()
                    sending.append((dist.isend(out, self.mesh.pipeline_peer(after), group=self.mesh.pipeline), out))
        for work, _ in sending:
            if work is not None:
                work.wait()
        return results


def _split(rows: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    split = {name: tensor.tensor_split(parts) for name, tensor in rows.items()}
    return [{name: pieces[i] for name, pieces in split.items()} for i in range(parts)]
