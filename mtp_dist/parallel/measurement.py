"""How long a block and the heads really take on this machine: what ``parallel.costs`` takes.

One process runs a chunk of some blocks, and the last chunk without any, as a pipeline would: forward, backward, and the weight
gradients from their queue. A block is timed among several, so that what a chunk costs apart from its blocks does not count.
Tensor parallelism is not measured: it makes all parts smaller alike.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mtp_dist.config.attention import choose
from mtp_dist.config.heads import lookahead, predicts_tokens
from mtp_dist.config.schema import TrainingRun
from mtp_dist.model.attention import capability, document_starts, most_documents
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from mtp_dist.model.weight_gradients import WeightGradients
from mtp_dist.parallel.cost import Costs, Work

Result = TypeVar("Result")

BLOCKS = 4
WARM_UP = 2


def measured_costs(config: TrainingRun, device: torch.device, rounds: int = 12) -> Costs:
    """Seconds of one micro-batch, the median of `rounds`, in the run's dtype."""
    blocks, tail = _Timed(config, BLOCKS, device), _Timed(config, 0, device)
    for _ in range(WARM_UP):
        blocks.round()
        tail.round()
    # They take turns, so that a change in the machine's load meets both.
    times = [(blocks.round(), tail.round()) for _ in range(rounds)]

    def middle(which: int) -> Work:
        return Work(*(statistics.median(pair[which][part] for pair in times) for part in range(3)))

    return Costs(middle(0) * (1 / BLOCKS), middle(1))


class _Timed:
    """A chunk in the middle of a trunk with so many blocks, or with none the last chunk."""

    def __init__(self, config: TrainingRun, blocks: int, device: torch.device) -> None:
        config = copy.deepcopy(config)
        self.device, dtype = device, getattr(torch, config.train.dtype)
        layers = range(1, 1 + blocks) if blocks else range(config.model.layers, config.model.layers)
        with torch.device("meta"):
            # Which tokens are drafted makes no difference to the time.
            drafted = range(config.mtp.draft_vocabulary or 0)
            self.chunk = Chunk(config.model, config.mtp, layers, first=False, last=blocks == 0, draft_tokens=drafted)
        initialize(self.chunk, config.seed)
        self.chunk.to(device, dtype)
        self.chunk.recompute = config.train.recompute
        self.chunk.attention = choose(config.model, config.train, device.type, capability(device)).backend
        for p in self.chunk.parameters():
            p.grad_dtype = torch.float32
        if config.train.compile:
            self.chunk.compile_blocks()
        self.queue = WeightGradients()
        self.chunk.defer_weight_gradients(self.queue)
        rows, positions, depth = config.train.micro_batch, config.train.sequence_length, config.mtp.depth
        generator = torch.Generator().manual_seed(1)
        width = positions + 1 + lookahead(config.mtp)
        assert config.model.vocab_size is not None
        self.rows = {
            "tokens": torch.randint(0, config.model.vocab_size, (rows, width), generator=generator).to(device),
            "documents": torch.zeros((rows, width), dtype=torch.int32, device=device),
            "scale": torch.full((rows, 1 + depth), 1 / (rows * positions), device=device),
        }
        if predicts_tokens(config.mtp):
            # A prediction costs the same wherever it is taken.
            self.rows["own"] = torch.ones((rows, positions, depth), dtype=torch.bool, device=device)
        if self.chunk.attention == "varlen":
            attending = self.rows["documents"][:, :positions]
            self.rows["starts"] = document_starts(attending, most_documents(attending))
        width = config.model.hidden * self.chunk.states_in
        self.hidden = torch.randn((rows, positions, width), generator=generator).to(device, dtype)

    def round(self) -> Work:
        """Seconds of one micro-batch's passes."""
        hidden, found = self.hidden.requires_grad_(), []

        def forward() -> Tensor:
            out = self.chunk(hidden, **self.rows)
            return out[0] if self.chunk.last else out.sum()

        out, seconds = self._time(forward)
        found.append(seconds)
        found.append(self._time(lambda: out.backward())[1])
        found.append(self._time(self.queue.take())[1])
        hidden.grad = None
        return Work(*found)

    def _time(self, run: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        begin = time.perf_counter()
        result = run()
        self._wait()
        return result, time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
