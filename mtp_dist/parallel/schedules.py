"""Torch's pipeline schedules by the names that ``parallel.schedule`` takes."""

from typing import Any

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)


class OneForwardOneBackward(Schedule1F1B):
    """Torch's 1F1B, also with fewer micro-batches than stages.

    Torch (2.13) refuses those in its constructor alone; its loop starts with min(micro-batches, stages - rank) forward passes, as
    it must (arXiv 2104.04473, section 2.2), and has nothing else that depends on their number.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        PipelineScheduleSingle.__init__(self, *args, **options)


SCHEDULES: dict[str, Any] = {
    "1f1b": OneForwardOneBackward,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
