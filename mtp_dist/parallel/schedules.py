"""Torch's pipeline schedules by the names that ``parallel.schedule`` takes."""

from typing import Any

from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
