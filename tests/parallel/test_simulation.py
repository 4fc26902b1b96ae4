"""Promise: a simulated step keeps every dependence, runs what torch runs, and gives the bubbles that the papers derive."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp_dist.config.layout import SCHEDULES, chunks, chunks_of_rank, fewest_micro_batches
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.parallel.budget import chunks_in_flight
from mtp_dist.parallel.cost import Work
from mtp_dist.parallel.passes import Pass, orders
from mtp_dist.parallel.simulation import inputs, simulate

LAYOUTS = st.builds(
    ParallelConfig, pipeline=st.integers(1, 6), schedule=st.sampled_from(SCHEDULES), interleave=st.integers(2, 3)
)
TIMES = st.floats(0.1, 10)


def works(parallel: ParallelConfig, *each: float) -> list[Work]:
    return [Work(*each)] * chunks(parallel)


def count_of(parallel: ParallelConfig, rounds: int) -> int:
    """Micro-batches that every schedule takes; no rounds: the fewest."""
    return max(parallel.pipeline * rounds, fewest_micro_batches(parallel))


@given(LAYOUTS, st.integers(0, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_every_pass_runs_once_after_its_inputs(parallel: ParallelConfig, rounds: int, data: st.DataObject) -> None:
    micro_batches, count = count_of(parallel, rounds), chunks(parallel)
    work = [Work(data.draw(TIMES), data.draw(TIMES), data.draw(TIMES)) for _ in range(count)]
    step = simulate(parallel, orders(parallel, micro_batches), work)
    ends: dict[Pass, float] = {}
    for rank, played in enumerate(step.times):
        before = 0.0
        for one, begin, end in played:
            assert one.chunk in chunks_of_rank(parallel, rank)
            assert begin >= before
            before = ends[one] = end
            if one.kind == "BW":
                ends[Pass("B", one.chunk, one.micro_batch)] = ends[Pass("W", one.chunk, one.micro_batch)] = end
    for played in step.times:
        for one, begin, _ in played:
            assert all(ends[need] <= begin for need in inputs(one, count))
    passes = {Pass(kind, number, m) for kind in "FBW" for number in range(count) for m in range(micro_batches)}
    assert {one for one in ends if one.kind != "BW"} == passes
    ranks = [chunks_of_rank(parallel, rank) for rank in range(parallel.pipeline)]
    busiest = max(micro_batches * sum(work[number].total for number in numbers) for numbers in ranks)
    assert step.length >= busiest * (1 - 1e-9)
    assert step.length <= micro_batches * sum(one.total for one in work) * (1 + 1e-9), "never longer than one process"
    assert all(-1e-9 <= bubble < 1 for bubble in step.bubbles)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 4), (4, 16), (8, 24), (2, 1), (4, 1), (4, 3), (8, 2)])
def test_one_forward_one_backward_has_the_known_bubble(ranks: int, micro_batches: int) -> None:
    """(P - 1) / (M + P - 1) of the step, whatever the ratio of forward and backward (arXiv 2104.04473, section 2.2.1)."""
    parallel = ParallelConfig(pipeline=ranks, schedule="1f1b")
    step = simulate(parallel, orders(parallel, micro_batches), works(parallel, 1, 1.25, 0.75))
    assert step.length == pytest.approx(3 * (micro_batches + ranks - 1))
    assert step.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@given(LAYOUTS.filter(lambda parallel: parallel.pipeline > 1), st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_passes_in_flight_are_those_of_the_order(parallel: ParallelConfig, micro_batches: int) -> None:
    """What the plan counts in a formula, in whatever number of micro-batches the schedule takes."""
    ranks = parallel.pipeline
    assume(micro_batches >= fewest_micro_batches(parallel))
    assume(parallel.schedule != "interleaved" or micro_batches % max(1, micro_batches // ranks) == 0)
    for rank, order in enumerate(orders(parallel, micro_batches)):
        count = most = 0
        for one in order:
            count += {"F": 1, "BW": -1, "W": -1}.get(one.kind, 0)
            most = max(most, count)
        assert most == chunks_in_flight(parallel, rank, micro_batches)


def test_zero_bubble_v_is_nearly_without() -> None:
    """Equal passes: only the first rank's inputs have to travel to the last one (arXiv 2401.10241, section 6)."""
    parallel = ParallelConfig(pipeline=4, schedule="zbv")
    step = simulate(parallel, orders(parallel, 16), works(parallel, 1, 1, 1))
    classic = ParallelConfig(pipeline=4, schedule="1f1b")
    assert step.bubble < 0.04 < simulate(classic, orders(classic, 16), works(classic, 2, 2, 2)).bubble
    # Heads that make the last chunk's forward pass long are what it is not made for.
    heavy = [*works(parallel, 1, 1, 1)[:-1], Work(7, 1, 1)]
    assert simulate(parallel, orders(parallel, 16), heavy).bubble > 2 * step.bubble


def test_orders_that_wait_for_each_other_are_refused() -> None:
    parallel = ParallelConfig(pipeline=2, schedule="1f1b")
    first, second = orders(parallel, 2)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(parallel, [first[::-1], second], works(parallel, 1, 1, 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_simulated_order_is_the_one_that_runs(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1F1B is written out here, against what torch's step loop calls; the others are read from what the runtime executes."""
    parallel = ParallelConfig(pipeline=3, schedule=schedule)
    ran: list[Pass] = []
    for rank in range(3):
        ran.clear()
        _run_on_recorders(parallel, rank, 6, ran, monkeypatch)
        assert ran == orders(parallel, 6)[rank]


def _run_on_recorders(parallel: ParallelConfig, rank: int, micro_batches: int, ran: list[Pass], patch: Any) -> None:
    """Torch's own step loop on one rank, with stages that only write down what they are asked to compute."""
    from torch.distributed.pipelining import schedules as torch_schedules

    from mtp_dist.parallel.schedules import SCHEDULES as BY_NAME

    patch.setattr(torch_schedules, "_batch_p2p", lambda *_, **__: [])
    count = chunks(parallel)

    def stage(number: int) -> Any:
        def backward(micro_batch: int, full_backward: bool = True, **_: Any) -> None:
            ran.append(Pass("BW" if full_backward else "B", number, micro_batch))

        return SimpleNamespace(
            stage_index=number, num_stages=count, group_size=parallel.pipeline, group_rank=rank, submod=None, has_backward=True,
            is_first=number == 0, is_last=number == count - 1,
            forward_one_chunk=lambda m, *_, **__: ran.append(Pass("F", number, m)),
            backward_one_chunk=backward,
            backward_weight_one_chunk=lambda m, **_: ran.append(Pass("W", number, m)),
            set_local_fwd_input=lambda *_: None, set_local_bwd_input=lambda *_: None, get_local_bwd_output=lambda *_: None,
            perform_reduce_grad=lambda *_: None,
            **{f"get_{way}_{what}_ops": lambda *_: [] for way in ("fwd", "bwd") for what in ("send", "recv")},
        )  # fmt: skip

    stages = [stage(number) for number in chunks_of_rank(parallel, rank)]
    schedule = BY_NAME[parallel.schedule](stages if len(stages) > 1 else stages[0], micro_batches, lambda *_: None)
    for name in ("_initialize_stage", "_initialize_stages", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        if hasattr(schedule, name):
            patch.setattr(schedule, name, lambda *_, **__: None)
    parts = [()] * micro_batches
    schedule._step_microbatches(parts, [{}] * micro_batches, None, None)


def test_a_measurement_has_all_parts() -> None:
    import torch

    from mtp_dist.config.resolution import resolve
    from mtp_dist.parallel.measurement import measured_costs

    config = TrainingRun()
    config.model.vocab_size, config.model.hidden, config.model.heads, config.model.kv_heads = 64, 32, 4, 2
    config.train.sequence_length, config.train.steps, config.train.micro_batch = 16, 1, 2
    found = measured_costs(resolve(config, None), torch.device("cpu"), rounds=2)
    assert all(part > 0 and math.isfinite(part) for work in found for part in work)
