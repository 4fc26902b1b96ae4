"""What is minimised: L = lambda_0(tokens) L_main + lambda(tokens) / d * sum_k w_k L_k (or as `mtp.normalize` says), and how it
becomes weights of single targets. k goes to d, the depth in force: D, or fewer by `mtp.curriculum`.

Each L_k is a sum over its valid targets divided by the number of valid targets in the whole global batch, so the value does not
depend on the layout. Pure functions.
"""

import torch
from torch import Tensor

from mtp_dist.config.schema import MTPConfig, TrainingRun
from mtp_dist.training.own_tokens import Draws


def _scheduled(first: float, points: list[list[float]], shape: str, tokens_seen: int) -> float:
    """`first`, then the last reached of the [tokens, value] `points`, or on a straight line from it to the next one
    (`shape`=linear)."""
    begin, value = 0.0, first
    for tokens, later in points:
        if tokens_seen < tokens:
            if shape == "linear":
                value += (later - value) * (tokens_seen - begin) / (tokens - begin)
            break
        begin, value = tokens, later
    return value


def loss_weight(mtp: MTPConfig, tokens_seen: int) -> float:
    """Lambda after so many trained positions."""
    return _scheduled(mtp.loss_weight, mtp.loss_weight_points, mtp.loss_weight_shape, tokens_seen)


def main_loss_weight(mtp: MTPConfig, tokens_seen: int) -> float:
    """Lambda_0 after so many trained positions."""
    return _scheduled(mtp.main_loss_weight, mtp.main_loss_weight_points, mtp.loss_weight_shape, tokens_seen)


def sampling_probability(mtp: MTPConfig, tokens_seen: int) -> float:
    """How likely a depth is fed the model's own prediction after so many trained positions; see ``own_tokens``."""
    return _scheduled(mtp.scheduled_sampling, mtp.scheduled_sampling_points, mtp.scheduled_sampling_shape, tokens_seen)


def depth_weights(mtp: MTPConfig) -> list[float]:
    """w_1 .. w_D."""
    return list(mtp.depth_weights) or [mtp.decay**k for k in range(mtp.depth)]


def depth_in_force(mtp: MTPConfig, tokens_seen: int) -> int:
    """The d of D depths that are trained after so many trained positions: D, then the last reached point of `curriculum`."""
    reached = [depth for tokens, depth in mtp.curriculum if tokens <= tokens_seen]
    return int(reached[-1]) if reached else mtp.depth


def coefficients(mtp: MTPConfig, tokens_seen: int) -> list[float]:
    """Weights of L_main, L_1 .. L_d in the total, d the depth in force."""
    weights = depth_weights(mtp)[: depth_in_force(mtp, tokens_seen)]
    shares = {"mean": len(weights), "sum": 1, "weights": sum(weights)}[mtp.normalize]
    factor = loss_weight(mtp, tokens_seen) / shares if shares else 0.0
    return [main_loss_weight(mtp, tokens_seen), *(factor * w for w in weights)]


def draws(config: TrainingRun, step: int, tokens_seen: int) -> Draws:
    """What the step after `step` others and so many trained positions draws of the model's own predictions."""
    return Draws(config.seed, step, sampling_probability(config.mtp, tokens_seen))


def target_scale(parts: list[float], counts: Tensor, replicas: int) -> Tensor:
    """float32 [1+D]: weight of one valid target at each depth. `counts` [1+D] are global; a depth without valid targets gets 0,
    as does one beyond the 1+d `parts`.

    Multiplied by the number of replicas because ZeRO averages gradients over them.
    """
    wanted = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    wanted[: len(parts)] = torch.tensor(parts, dtype=torch.float64) * replicas
    return torch.where(counts > 0, wanted / counts.clamp(min=1), 0.0).float()
