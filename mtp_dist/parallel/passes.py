"""In which order each pipeline rank runs its passes, as plain values that a simulation takes.

1F1B is written out here (arXiv 2104.04473, section 2.2); the others are read off torch's own schedules, so that what is simulated
is what runs.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from mtp_dist.config.layout import chunks, chunks_of_rank
from mtp_dist.config.schema import ParallelConfig


class Pass(NamedTuple):
    """`kind`: F, forward; B, gradient of the input; W, gradient of the weights; BW, both gradients at once."""

    kind: str
    chunk: int
    micro_batch: int


Order = list[Pass]
"""The passes of one rank."""

_KINDS = {"FORWARD": "F", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "BW"}


def orders(parallel: ParallelConfig, micro_batches: int) -> list[Order]:
    """The order of each pipeline rank."""
    if parallel.pipeline == 1:
        return [[one for m in range(micro_batches) for one in (Pass("F", 0, m), Pass("BW", 0, m))]]
    if parallel.schedule == "1f1b":
        return [_one_forward_one_backward(parallel.pipeline, rank, micro_batches) for rank in range(parallel.pipeline)]
    return _of_torch(parallel, micro_batches)


def _one_forward_one_backward(ranks: int, rank: int, micro_batches: int) -> Order:
    ahead = min(micro_batches, ranks - rank)
    order = [Pass("F", rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        order.append(Pass("BW", rank, m))
        if ahead + m < micro_batches:
            order.append(Pass("F", rank, ahead + m))
    return order


def _of_torch(parallel: ParallelConfig, micro_batches: int) -> list[Order]:
    # Here, so that without such a schedule nothing needs torch.
    from mtp_dist.parallel.schedules import SCHEDULES

    # A schedule reads nothing of its stages but where they are.
    count, ranks = chunks(parallel), parallel.pipeline
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=number,
            num_stages=count,
            group_size=ranks,
            group_rank=0,
            is_first=number == 0,
            is_last=number == count - 1,
            has_backward=True,
            submod=None,
        )
        for number in chunks_of_rank(parallel, 0)
    ]
    # A loss function, though none is called: without one there would be no backward pass.
    schedule = SCHEDULES[parallel.schedule](stages, micro_batches, lambda *_: None)
    found = []
    for rank in range(ranks):
        parts = [part for action in schedule.pipeline_order[rank] if action for part in (action.sub_actions or (action,))]
        found.append([
            Pass(_KINDS[part.computation_type.name], part.stage_index, part.microbatch_index)
            for part in parts
            if part.computation_type.name in _KINDS
        ])
    return found
