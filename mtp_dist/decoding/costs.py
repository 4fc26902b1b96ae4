"""What decoding costs on this machine: a pass over n tokens beside a pass over one, and a draft.

v(n) = t(n) / t(1), the verify cost curve, and c, the cost of one draft in units of t(1). With E tokens a forward, γ drafts a
round should make decoding E / (v(γ+1) + γ c) times as fast as one token a forward.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

import torch
from torch import nn

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.batch import Batch
from mtp_dist.decoding.drafter import Drafter, Proposal
from mtp_dist.decoding.drafters import build_drafter, most_nodes, room
from mtp_dist.decoding.layout import ModelPart, open_model
from mtp_dist.decoding.model import TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.text import Texts
from mtp_dist.decoding.tree import Tree
from mtp_dist.model.chunk import Chunk


@dataclass(frozen=True)
class Costs:
    """Medians in seconds. verify[n-1]: a pass of the trunk and the output head over n tokens of each row; draft: one draft of
    each row, what the drafter does with the states of the pass included."""

    verify: list[float]
    draft: float

    @property
    def curve(self) -> list[float]:
        """v(1), v(2), .."""
        return [seconds / self.verify[0] for seconds in self.verify]

    @property
    def draft_cost(self) -> float:
        """c."""
        return self.draft / self.verify[0]

    def speedup(self, tokens_per_forward: float, drafts: int) -> float:
        """What is expected of E tokens a forward with γ drafts each; in a tree, with so many nodes."""
        return tokens_per_forward / (self.curve[drafts] + drafts * self.draft_cost)


class Timed:
    """A drafter, and the seconds of each of its rounds."""

    def __init__(self, drafter: Drafter, device: torch.device) -> None:
        self.drafter, self.device = drafter, device
        self.seconds: list[float] = []

    def prefill(self, texts: Texts, trunk: TrunkPass) -> None:
        self.drafter.prefill(texts, trunk)

    def observe(self, texts: Texts, trunk: TrunkPass) -> None:
        begun = clock(self.device)
        self.drafter.observe(texts, trunk)
        self.seconds[-1] += clock(self.device) - begun

    def propose(self, texts: Texts, count: int) -> Proposal | Tree:
        begun = clock(self.device)
        found = self.drafter.propose(texts, count)
        self.seconds.append(clock(self.device) - begun)
        return found

    def keep(self, rows: list[int]) -> None:
        self.drafter.keep(rows)

    def join(self, other: Self) -> None:
        self.drafter.join(other.drafter)


@torch.inference_mode()
def measure(
    model: Chunk | ModelPart,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    drafts: int,
    *,
    vocabulary: int | None = None,
    draft_model: nn.Module | None = None,
    rounds: int = 9,
) -> Costs:
    """Costs of these prompts decoded together, ``drafts`` >= 1 of each in a round, or trees of that depth.

    Each pass is timed where it occurs: one token where plain decoding would be after so many tokens, several where rounds of
    drafts have left the texts, which then differ in length (that costs: see ``Span``).
    """
    nodes = drafts if config.tree == "none" else most_nodes(config, model.depth)
    capacity = max(map(len, prompts)) + (rounds + 1) * (drafts + 1) + max(drafts, room(config, model.depth)) + 1
    decoder = open_model(model, capacity, vocabulary=vocabulary)
    sampling, chance = Sampling.of(config), Chance([None] * len(prompts))
    drafter = Timed(build_drafter(decoder, len(prompts), config, sampling, chance, other=draft_model), decoder.device)
    plain, fast = (Batch(decoder, prompts, sampling, each, chance) for each in (None, drafter))
    plain.start()
    fast.start()
    for _ in range(rounds + 1):
        fast.advance(drafts)
    for _ in range((sum(fast.texts.known) - sum(plain.texts.known)) // len(prompts)):
        plain.advance(0)
    passes: list[list[float]] = [[] for _ in range(nodes + 1)]
    for _ in range(rounds + 1):
        # In turn, so that a slow moment of the machine is not one length's alone.
        for width, seconds in enumerate(passes, start=1):
            batch = plain if width == 1 else fast
            before = [known - 1 for known in batch.texts.known]
            for cache in batch.caches:
                cache.crop(before)
            begun = clock(decoder.device)
            found = decoder.trunk(batch.texts.tokens, batch.caches, [length + width for length in before])
            decoder.logits(found.after_norm)
            seconds.append(clock(decoder.device) - begun)
    # The first round starts threads and kernels.
    return Costs([median(seconds[1:]) for seconds in passes], median(drafter.seconds[1:]) / nodes)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
