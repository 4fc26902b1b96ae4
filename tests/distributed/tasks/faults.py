"""What may be wrong in a product that trains all the same."""

from typing import Any

from mtp_dist.training.step import Workload


def _double_a_gradient(workload: Workload) -> None:
    compute, victim = workload.gradients, next(iter(workload.engine.parameters.values()))

    def gradients(*arguments: Any) -> Any:
        totals = compute(*arguments)
        if victim.grad is not None:
            victim.grad *= 2
        return totals

    workload.gradients = gradients  # type: ignore[method-assign]


def _count_replicas_twice(workload: Workload) -> None:
    for p in workload.engine.parameters.values():
        p.ds_pipe_replicated, p.tensor_model_parallel = False, True  # type: ignore[attr-defined]


def _do_not_sum_the_embedding(workload: Workload) -> None:
    workload.engine.replica_of_first = None


def _lose_a_replica(workload: Workload) -> None:
    reduce = workload.engine.engine.allreduce_gradients

    def without() -> None:
        for p in workload.engine.parameters.values():
            if p.grad is not None and workload.mesh.data_rank > 0:
                p.grad.zero_()
        reduce()

    workload.engine.engine.allreduce_gradients = without


def _do_not_sum_shared_heads(workload: Workload) -> None:
    workload.engine._shared = list  # type: ignore[method-assign]


FAULTS = {
    "doubled gradient": _double_a_gradient,
    "replicas counted twice": _count_replicas_twice,
    "no sum over the embedding's copies": _do_not_sum_the_embedding,
    "a replica lost": _lose_a_replica,
    "no sum over ranks that share a head": _do_not_sum_shared_heads,
}
"""What may be wrong in a product that trains all the same: ``parity`` with one of them must differ from the reference."""
