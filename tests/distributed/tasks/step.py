"""Steps of a layout on given rows, and what a rank then holds."""

from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from mtp_dist.checkpoint.fragment_file import FragmentFile
from mtp_dist.config.layout import tokens_per_step
from mtp_dist.config.schema import TrainingRun
from mtp_dist.model import head_loss
from mtp_dist.model.parameter import spec_of
from mtp_dist.parallel.engine import MOMENTS
from mtp_dist.parallel.mesh import Mesh, build_mesh
from mtp_dist.training.objective import coefficients, draws
from mtp_dist.training.statistics import gather
from mtp_dist.training.step import Workload, build
from tests.distributed.layouts import configuration, draft_tokens, replica_batch
from tests.distributed.tasks.faults import FAULTS
from tests.distributed.tasks.oracle import STEPS


def own_rows(config: TrainingRun, mesh: Mesh, step: int) -> Any:
    return replica_batch(config, step, mesh.data_rank) if mesh.is_reader else None


def _slices(workload: Workload, values: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """name -> (global shape, start of this rank's slice, values)."""
    found = {}
    for name, p in workload.engine.parameters.items():
        if name in values:
            found[name] = (p.spec.shape, p.spec.start, values[name].detach().clone())
    return found


@torch.no_grad()
def _reduced_gradients(workload: Workload) -> dict[str, Tensor]:
    """What the epilogue will make of the gradients, computed here on copies: sums over tensor ranks that have seen a part, tied
    sum, then mean over replicas."""
    found = {}
    if workload.engine.shards_gradients:
        return {name: deepspeed.utils.safe_get_full_grad(p) for name, p in workload.engine.trained.items()}
    for name, p in workload.engine.trained.items():
        gradient = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.clone()
        if workload.mesh.tensor.shares_positions and p.spec.split is None:
            workload.mesh.tensor.all_reduce(gradient)
        if p.spec.sharers > 1:
            own = workload.mesh.tensor.rank // p.spec.sharers * p.spec.sharers
            gradient = workload.mesh.tensor.stacked(gradient)[own : own + p.spec.sharers].sum(0)
        if p is workload.engine.replica_of_first:
            dist.all_reduce(gradient, group=workload.mesh.tied)
        dist.all_reduce(gradient, group=workload.mesh.replicas)
        found[name] = gradient / workload.mesh.parallel.data
    return found


def _masters(workload: Workload) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int, Tensor]]:
    """name, start and shape of this rank's slice, where in the flattened slice the values begin, values."""
    found = []
    for fragment in workload.engine.fragments(all_copies=True):
        spec = spec_of(workload.engine.parameters[fragment.name])
        found.append((fragment.name, spec.start, spec.local_shape, fragment.begin, fragment.parts["master"].detach().clone()))
    return found


# So few logits at once that a micro-batch takes several turns; 48 and 49 rows of an odd vocabulary would cut it in other places.
@patch.object(head_loss, "LOGITS_IN_FLIGHT", 480)
def parity(layout: str | dict[str, Any], fault: str | None = None, **train: object) -> dict[str, Any]:
    """Losses and norms of three steps, the first step's gradients and what a rank then holds, the weights and masters after the
    last, and an evaluation. `fault`: of ``FAULTS``, done to the product first."""
    config = configuration(layout, **train)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload = build(config, mesh, draft_tokens(config))
    if fault is not None:
        FAULTS[fault](workload)
    losses, means, norms, gradients = [], [], [], {}
    rows = config.train.global_batch // config.parallel.data
    held_out = workload.evaluate(own_rows(config, mesh, 77), rows, config.train.micro_batch)
    for chunk in workload.pipeline.chunks:
        chunk.forward_calls = 0
    calls: list[int] = []
    for step in range(STEPS):
        parts = coefficients(config.mtp, step * tokens_per_step(config))
        drawn = draws(config, step, step * tokens_per_step(config))
        totals = gather(*workload.gradients(own_rows(config, mesh, step), parts, drawn), mesh)
        if step == 0:
            gradients = _slices(workload, _reduced_gradients(workload))
            held = _held(workload, config, mesh)
            calls = [chunk.forward_calls for chunk in workload.pipeline.chunks]
        outcome = workload.engine.step(config.optim.lr)
        losses.append(totals.loss)
        means.append(totals.means())
        norms.append(outcome.gradient_norm)
    weights = _slices(workload, {name: workload.engine.weight(name) for name in workload.engine.parameters})
    return {
        "losses": losses,
        "means": means,
        "norms": norms,
        "gradients": gradients,
        "held": held,
        "weights": weights,
        "masters": _masters(workload),
        "forward_calls": calls,
        "micro_batches": workload.pipeline.micro_batches,
        "held_out": held_out.means(),
    }


def compiled(layout: str, **train: object) -> dict[str, Any]:
    """``parity`` with compiled blocks, and what the compiler counted."""
    torch.compiler.reset()
    counters.clear()
    result = parity(layout, compile=True, **train)
    return result | {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}


def _gradient_bytes(engine: Any) -> int:
    if engine.shards_gradients:
        return sum(part.nbytes for parts in engine.engine.optimizer.averaged_gradients.values() for part in parts)
    return sum(p.grad.nbytes for p in engine.parameters.values() if p.grad is not None)


def _snapshot_bytes(workload: Workload) -> int:
    """Of the parameters' state in the buffer of a background save."""
    file = FragmentFile("file", workload.engine, buffered=True)
    assert file._buffer is not None
    return file._buffer.nbytes - torch.get_rng_state().nbytes


def _held(workload: Workload, config: TrainingRun, mesh: Mesh) -> dict[str, Any]:
    """Bytes that a rank really holds after a step's gradients, its place, and its schedule's passes in flight."""
    engine = workload.engine
    engine.complete_gradients()
    parameters = engine.parameters.values()
    flats = engine._flats()
    own = config.zero.stage > 0 and (config.zero.stage < 3 or config.zero.offload)  # not the weights themselves
    optimizer = [*(flats if own else []), *(state[moment] for state in engine._states for moment in MOMENTS)]
    if config.zero.offload:
        optimizer += [flat.grad for flat in flats if flat.grad is not None]
    order = getattr(workload.pipeline.schedule, "pipeline_order", {}).get(mesh.pipeline_rank)
    return {
        "rank": mesh.rank,
        "pipeline_rank": mesh.pipeline_rank,
        "weights": sum(p.nbytes + (p.ds_tensor.nbytes if engine.shards_parameters else 0) for p in parameters),
        "gradients": _gradient_bytes(engine),
        "optimizer": sum(tensor.nbytes for tensor in optimizer),
        "snapshot": _snapshot_bytes(workload),
        "in_flight": _most_in_flight(order) if order else None,
    }


def _most_in_flight(order: list[Any]) -> int:
    """Forward passes whose backward pass, weight gradients included, is still to come."""
    count = most = 0
    for action in order:
        for part in (action.sub_actions or (action,)) if action is not None else ():
            count += {"FORWARD": 1, "FULL_BACKWARD": -1, "BACKWARD_WEIGHT": -1}.get(part.computation_type.name, 0)
            most = max(most, count)
    return most


def drift(layout: str) -> list[float]:
    """What the check of the embedding's two copies finds after a step, and after one copy was touched."""
    config = configuration(layout)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload = build(config, mesh, draft_tokens(config))
    workload.step(own_rows(config, mesh, 0), coefficients(config.mtp, 0), config.optim.lr)
    found = [workload.engine.replica_drift()]
    if mesh.pipeline_rank == 1:
        workload.engine.parameters["embedding.weight"].data[3, 0] += 0.25
    return [*found, workload.engine.replica_drift()]


def storage(p: Any, engine: Any) -> Any:
    """What holds the weight between passes: the parameter, or its shard."""
    return p.ds_tensor if engine.shards_parameters else p
