"""When each pass of a step would run, given what passes cost: the length of a step and its bubble without running it.

A pass starts when its rank is free and its inputs are computed. Computation alone is simulated: messages take no time.
"""

from dataclasses import dataclass

from mtp_dist.config.layout import chunks, micro_batches
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.parallel.cost import Work, costs
from mtp_dist.parallel.passes import Order, Pass, orders
from mtp_dist.parallel.placement import layers_of_chunks


@dataclass
class Simulation:
    """`times`: for each rank its passes with begin and end, in the unit of the costs."""

    times: list[list[tuple[Pass, float, float]]]

    @property
    def length(self) -> float:
        """From the first pass of any rank to the end of the last."""
        return max(end for rank in self.times for _, _, end in rank)

    @property
    def bubbles(self) -> list[float]:
        """For each rank the share of the step in which it computes nothing."""
        return [1 - sum(end - begin for _, begin, end in rank) / self.length for rank in self.times]

    @property
    def bubble(self) -> float:
        """Mean over ranks."""
        return sum(self.bubbles) / len(self.times)


def duration(one: Pass, works: list[Work]) -> float:
    """Time of a pass; never quite 0, so that what follows it comes after it."""
    work = works[one.chunk]
    time = {"F": work.forward, "B": work.backward, "W": work.weight, "BW": work.backward + work.weight}[one.kind]
    return max(time, 1e-9)


def inputs(one: Pass, count: int) -> list[Pass]:
    """The passes that must be over before this one; B stands for BW too. `count`: chunks."""
    kind, chunk, m = one
    if kind == "F":
        return [Pass("F", chunk - 1, m)] if chunk else []
    if kind == "W":
        return [Pass("B", chunk, m)]
    own = Pass("F", chunk, m)
    return [own, Pass("B", chunk + 1, m)] if chunk + 1 < count else [own]


def simulate(parallel: ParallelConfig, order: list[Order], works: list[Work]) -> Simulation:
    """Run the order of each rank with this work of each chunk. Raises ValueError for orders that wait for each other."""
    count = chunks(parallel)
    over: dict[Pass, float] = {}
    result = Simulation([[] for _ in order])
    free, position, moved = [0.0] * len(order), [0] * len(order), True
    while moved:
        moved = False
        for rank, passes in enumerate(order):
            while position[rank] < len(passes):
                one = passes[position[rank]]
                needed = inputs(one, count)
                if any(need not in over for need in needed):
                    break
                begin = max([free[rank], *(over[need] for need in needed)])
                free[rank] = end = begin + duration(one, works)
                over[Pass("B", one.chunk, one.micro_batch) if one.kind == "BW" else one] = end
                result.times[rank].append((one, begin, end))
                position[rank] += 1
                moved = True
    if any(at < len(passes) for at, passes in zip(position, order, strict=True)):
        raise ValueError("the orders of the ranks wait for each other")
    return result


def simulated_step(config: TrainingRun) -> Simulation:
    """The passes of one step under this configuration's schedule and placement, with ``cost.costs``."""
    parallel, sizes = config.parallel, [len(part) for part in layers_of_chunks(config)]
    return simulate(parallel, orders(parallel, micro_batches(config)), costs(config).of_chunks(sizes))
