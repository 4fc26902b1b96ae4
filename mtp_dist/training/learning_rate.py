"""Learning rate as a pure function of trained tokens: linear warm-up, then cosine, warm-up-stable-decay, or constant."""

import math

from mtp_dist.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, tokens: int, total: int) -> float:
    """Rate of the step that ends after `tokens` of `total` trained positions, so the first step of a warm-up is not lost to a
    rate of 0."""
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    low = peak * schedule.min_ratio
    if schedule.kind == "cosine":
        progress = min(1.0, (tokens - schedule.warmup_tokens) / max(1, total - schedule.warmup_tokens))
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        decay = schedule.decay_tokens if schedule.decay_tokens is not None else total // 5
        left = max(0, total - tokens)
        return peak if left >= decay else low + (peak - low) * left / max(1, decay)
    return peak
