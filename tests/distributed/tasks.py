"""What pools run under a layout, and the same on one process without any of the parallel code."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mtp_dist.config.schema import Evaluation, ParallelConfig, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.model import head_loss
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize, spec_of
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.parallel.engine import MOMENTS
from mtp_dist.parallel.mesh import Mesh, build_mesh
from mtp_dist.training.objective import coefficients, target_scale
from mtp_dist.training.statistics import Totals, gather
from mtp_dist.training.step import Workload, build
from tests.distributed.layouts import configuration, global_batch, replica_batch

STEPS = 3
SPLITS = 4
"""Micro-batches of the reference in bfloat16."""


def _own_rows(config: TrainingRun, mesh: Mesh, step: int) -> Any:
    return replica_batch(config, step, mesh.data_rank) if mesh.is_reader else None


def _slices(workload: Workload, values: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """name -> (global shape, start of this rank's slice, values)."""
    found = {}
    for name, p in workload.engine.parameters.items():
        if name in values:
            found[name] = (p.spec.shape, p.spec.start, values[name].detach().clone())
    return found


def _reduced_gradients(workload: Workload) -> dict[str, Tensor]:
    """What the epilogue will make of the gradients, computed here on copies: tied sum, then mean over replicas."""
    found = {}
    if workload.engine.shards_gradients:
        return {name: deepspeed.utils.safe_get_full_grad(p) for name, p in workload.engine.trained.items()}
    for name, p in workload.engine.trained.items():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        if workload.mesh.tensor.shares_positions and p.spec.split is None:
            workload.mesh.tensor.all_reduce(gradient)
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


def _double_a_gradient(workload: Workload) -> None:
    compute, victim = workload.gradients, next(iter(workload.engine.parameters.values()))

    def gradients(batch: Any, parts: list[float]) -> Any:
        totals = compute(batch, parts)
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


FAULTS = {
    "doubled gradient": _double_a_gradient,
    "replicas counted twice": _count_replicas_twice,
    "no sum over the embedding's copies": _do_not_sum_the_embedding,
    "a replica lost": _lose_a_replica,
}
"""What may be wrong in a product that trains all the same: ``parity`` with one of them must differ from the reference."""


# So few logits at once that a micro-batch takes several turns; 48 and 49 rows of an odd vocabulary would cut it in other places.
@patch.object(head_loss, "LOGITS_IN_FLIGHT", 480)
def parity(layout: str | dict[str, Any], fault: str | None = None, **train: object) -> dict[str, Any]:
    """Losses and norms of three steps, the first step's gradients, the weights and masters after the last, and an evaluation.
    `fault`: of ``FAULTS``, done to the product first."""
    config = configuration(layout, **train)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload = build(config, mesh)
    if fault is not None:
        FAULTS[fault](workload)
    parts = coefficients(config.mtp, 0)
    losses, means, norms, gradients = [], [], [], {}
    rows = config.train.global_batch // config.parallel.data
    held_out = workload.evaluate(_own_rows(config, mesh, 77), rows, config.train.micro_batch)
    for chunk in workload.pipeline.chunks:
        chunk.forward_calls = 0
    calls: list[int] = []
    for step in range(STEPS):
        totals = gather(*workload.gradients(_own_rows(config, mesh, step), parts), mesh)
        if step == 0:
            gradients = _slices(workload, _reduced_gradients(workload))
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


def reference(layout: str | dict[str, Any]) -> dict[str, Any]:
    """The same three steps by plain autograd on one whole model, torch's own AdamW and clipping.

    float32: the whole global batch at once. bfloat16: the same of weights that are rounded from float32 masters before each step,
    with gradients of single micro-batches added up in float32: what mixed precision means, without any of the parallel code.
    """
    config = configuration(layout)
    dtype = getattr(torch, config.train.dtype)
    masters, model = _whole_model(config), _whole_model(config).to(dtype)
    learning = {name: p for name, p in masters.named_parameters() if name.startswith("mtp.") or not config.mtp.freeze_trunk}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": config.optim.weight_decay if p.ndim >= 2 else 0.0,
                "lr": config.optim.lr * (config.optim.head_lr_ratio if name.startswith("mtp.") else 1.0),
            }
            for name, p in learning.items()
        ],
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
    initial = {name: p.detach().clone() for name, p in masters.named_parameters()}
    splits = 1 if dtype == torch.float32 else SPLITS
    parts = coefficients(config.mtp, 0)
    losses, means, norms, gradients = [], [], [], {}
    held_out = _reference_result(model, config, 77, parts, 1)[1].means()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, totals = _reference_result(model, config, step, parts, splits, learning)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
        norms.append(nn.utils.clip_grad_norm_(learning.values(), config.optim.clip).item())
        optimizer.step()
        model.load_state_dict(masters.state_dict())
        losses.append(loss)
        means.append(totals.means())
    return {
        "losses": losses,
        "means": means,
        "norms": norms,
        "gradients": gradients,
        "held_out": held_out,
        "initial": initial,
        "weights": {name: p.detach() for name, p in masters.named_parameters()},
    }


def _whole_model(config: TrainingRun) -> Chunk:
    with torch.device("meta"):
        model = Chunk(config.model, config.mtp, range(config.model.layers))
    initialize(model, config.seed)
    return model


def _reference_result(
    model: Chunk,
    config: TrainingRun,
    step: int,
    parts: list[float],
    splits: int,
    learning: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> tuple[float, Totals]:
    """The loss and the statistics of a global batch; its gradients are added to those of the parameters that are `learning`."""
    batch = global_batch(config, step)
    counts = valid_counts(targets(batch.tokens, batch.documents, config.mtp.depth))
    scale = target_scale(parts, counts, replicas=1).expand(len(batch), -1)
    out = torch.zeros(model.result_size())
    for tokens, documents, weights in zip(*(rows.chunk(splits) for rows in (batch.tokens, batch.documents, scale)), strict=True):
        result = model(tokens=tokens, documents=documents, scale=weights)
        out += result.detach()
        if not learning:
            continue
        model.zero_grad()
        result[0].backward()
        for name, master in learning.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad + gradient
    return out[0].item(), Totals(out[0].item(), out[1:].view(len(counts), -1).double(), counts)


class Stop:
    """A request to stop that comes after a given step, instead of a signal."""

    def __init__(self, trainer_step: Any = None, at: int | None = None) -> None:
        self.trainer_step, self.at = trainer_step, at

    @property
    def asked(self) -> bool:
        return self.at is not None and self.trainer_step() >= self.at


def _train(config: TrainingRun, stop_at: int | None = None) -> None:
    from mtp_dist.training.trainer import Trainer

    trainer: Any = None
    stop = Stop(lambda: trainer.progress.step, stop_at)
    trainer = Trainer(config, build_mesh(config.parallel, torch.device("cpu")), stop)  # type: ignore[arg-type]
    try:
        trainer.run()
    finally:
        trainer.close()


def _settings(layout: str, data: str, run_dir: str, steps: int, overrides: dict[str, Any]) -> TrainingRun:
    config = configuration(layout, steps=steps, progress=False)
    config.run_dir, config.data.path, config.tracker.wandb = run_dir, data, "disabled"
    config.model.vocab_size = 265  # the byte tokenizer has 257; tensor ranks have unequal shares
    config.data.block_samples, config.validation.sequences = 4, 5
    config.train.dtype = "float32" if config.zero.stage == 0 else "bfloat16"
    config.schedule.kind, config.schedule.warmup_tokens = "cosine", 2 * 16 * 16
    for key, value in overrides.items():
        part, name = key.split(".")
        setattr(getattr(config, part), name, value)
    return config


def train(layout: str, data: str, run_dir: str, steps: int, stops: list[int], overrides: dict[str, Any]) -> None:
    """Train in `run_dir` to `steps`, stopping (with a checkpoint) after each step of `stops` and starting again from it."""
    for stop in [*stops, None]:
        _train(_settings(layout, data, run_dir, steps, overrides), stop)


def evaluate(checkpoint: str, parallel: dict[str, Any], sequences: int, micro_batch: int, output: str) -> dict[str, Any]:
    """A checkpoint's held-out result under a layout."""
    from mtp_dist.evaluate import measure, prepare

    config = Evaluation(checkpoint=checkpoint, sequences=sequences, micro_batch=micro_batch, dtype="float32", output=output)
    config.parallel = ParallelConfig(**parallel)
    ready = prepare(config)
    return measure(ready, build_mesh(ready.parallel, torch.device("cpu")))


def nonfinite(
    layout: str, data: str, run_dir: str, steps: int, at: list[int], kind: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Train with the steps of `at` made non-finite (see ``_poison``). Returns the error, what each step did, and the end."""
    from mtp_dist.errors import UserError
    from mtp_dist.training.trainer import Trainer

    config = _settings(layout, data, run_dir, steps, overrides)
    trainer: Any = Trainer(config, build_mesh(config.parallel, torch.device("cpu")), Stop())  # type: ignore[arg-type]
    _poison(trainer, at, kind)
    seen: list[dict[str, Any]] = []
    step_once = trainer.workload.step

    def step(batch: Any, parts: list[float], lr: float) -> Any:
        before = _state(trainer)
        totals, outcome = step_once(batch, parts, lr)
        unchanged = all(value.equal(before[name]) for name, value in _state(trainer).items())
        seen.append({"lr": lr, "applied": outcome.applied, "unchanged": unchanged, "loss": totals.loss})
        return totals, outcome

    trainer.workload.step = step
    error = None
    try:
        trainer.run()
    except UserError as caught:
        error = str(caught)
    finally:
        trainer.close()
    return {"error": error, "steps": seen, "progress": trainer.progress, "config": config}


def copy(run_dir: str) -> None:
    """A run folder as it is now, kept as <run_dir>-look for a test, since a later job goes on in it."""
    if dist.get_rank() == 0:
        shutil.copytree(run_dir, f"{run_dir}-look")
    dist.barrier()


def _poison(trainer: Any, at: list[int], kind: str) -> None:
    """Make the steps of `at` non-finite. "gradient": one element of it, on the last rank alone; "loss": a weight is infinite
    during forward and backward, and put back before the optimizer sees it."""
    workload, compute = trainer.workload, trainer.workload.gradients
    engine = workload.engine
    victim = _storage(next(p for name, p in engine.parameters.items() if name.endswith("mlp.down.weight")), engine)

    def gradients(batch: Any, parts: list[float]) -> Any:
        now = trainer.progress.step + 1 in at
        sound = victim.detach().clone()
        if now and kind == "loss":
            victim.data.view(-1)[0] = torch.inf
        totals = compute(batch, parts)
        victim.data.copy_(sound)
        if now and kind == "gradient" and dist.get_rank() == dist.get_world_size() - 1:
            # Sharded gradients are out of the parameters already.
            found = engine.engine.optimizer.averaged_gradients[0][0] if engine.shards_gradients else victim.grad
            found.view(-1)[0] = torch.nan
        return totals

    workload.gradients = gradients


def _state(trainer: Any) -> dict[str, Tensor]:
    """Copies of this rank's weights, masters and moments, and the number of AdamW's steps."""
    engine = trainer.workload.engine
    found = {name: _storage(p, engine).detach().clone() for name, p in engine.parameters.items()}
    for fragment in engine.fragments():
        for part, value in fragment.parts.items():
            found[f"{fragment.name}.{part}"] = value.detach().clone()
    found["optimizer_steps"] = torch.tensor(list(engine.optimizer_steps.values()))
    return found


def _storage(p: Any, engine: Any) -> Any:
    """What holds the weight between passes: the parameter, or its shard."""
    return p.ds_tensor if engine.shards_parameters else p


def _gradient_bytes(engine: Any) -> int:
    if engine.shards_gradients:
        return sum(part.nbytes for parts in engine.engine.optimizer.averaged_gradients.values() for part in parts)
    return sum(p.grad.nbytes for p in engine.parameters.values() if p.grad is not None)


def held(layout: str) -> dict[str, Any]:
    """Bytes that a rank really holds after one step's gradients, its place, and its schedule's passes in flight."""
    config = configuration(layout)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload = build(config, mesh)
    workload.gradients(_own_rows(config, mesh, 0), coefficients(config.mtp, 0))
    engine = workload.engine
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


def trouble(
    layout: str, data: str, run_dir: str, steps: int, overrides: dict[str, Any], read_fails_at: int | None = None
) -> str | None:
    """Train; returns the message of the error that this rank raised. `read_fails_at`: one reader cannot read that step's rows."""
    from mtp_dist.data.stream import Stream

    read, count = Stream.next, 0

    def next_rows(self: Stream) -> Any:
        nonlocal count
        count += 1
        if count == read_fails_at and dist.get_rank() == 0:
            raise UserError("shard lost")
        return read(self)

    Stream.next = next_rows  # type: ignore[method-assign]
    try:
        _train(_settings(layout, data, run_dir, steps, overrides))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Stream.next = read  # type: ignore[method-assign]
    return None


def write_later_format(checkpoint: str) -> None:
    """A sound checkpoint of a format that this version does not know."""
    if dist.get_rank() == 0:
        manifest = Path(checkpoint) / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace("mtp_dist.checkpoint/2", "mtp_dist.checkpoint/9"))
        summed = hashlib.sha256(manifest.read_bytes()).hexdigest()
        manifest.with_name("MANIFEST.sha256").write_text(f"{summed}  MANIFEST.json\n")
    dist.barrier()


def make_folder(path: str) -> None:
    """An empty folder."""
    if dist.get_rank() == 0:
        Path(path).mkdir(parents=True)
    dist.barrier()


def damage(checkpoint: str) -> None:
    """Flip a bit in the middle of rank 0's file."""
    if dist.get_rank() == 0:
        path = Path(checkpoint) / "rank_00000.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()


def drift(layout: str) -> list[float]:
    """What the check of the embedding's two copies finds after a step, and after one copy was touched."""
    config = configuration(layout)
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    workload = build(config, mesh)
    workload.step(_own_rows(config, mesh, 0), coefficients(config.mtp, 0), config.optim.lr)
    found = [workload.engine.replica_drift()]
    if mesh.pipeline_rank == 1:
        workload.engine.parameters["embedding.weight"].data[3, 0] += 0.25
    return [*found, workload.engine.replica_drift()]


def relay(layouts: list[str], data: str, run_dir: str, overrides: dict[str, Any]) -> None:
    """One run of as many steps as layouts, each step trained under another layout from the checkpoint of the one before."""
    for step, layout in enumerate(layouts, start=1):
        _train(_settings(layout, data, run_dir, len(layouts), overrides), step)


def background_save(data: str, run_dir: str, asynchronous: bool) -> dict[str, Any]:
    """Five steps, saved after the second, fourth and last. Asynchronous: the first file is not written before the third step has
    been trained. Returns the steps that were trained before any checkpoint was complete, and whether two saves ever met."""
    import threading

    from mtp_dist.checkpoint import folder
    from mtp_dist.checkpoint.fragment_file import FragmentFile
    from mtp_dist.training.trainer import Trainer

    write, one_step = FragmentFile.write, Trainer._one_step
    released, trained, writing, met = threading.Event(), [], [0], [False]

    def slow_write(self: FragmentFile, temporary: Path) -> Any:
        writing[0] += 1
        met[0] |= writing[0] > 1
        if asynchronous and not released.wait(60):
            raise OSError("never released")
        record = write(self, temporary)
        writing[0] -= 1
        return record

    def step(self: Trainer) -> bool:
        stop = one_step(self)
        if not folder.complete(Path(run_dir) / "checkpoints"):
            trained.append(self.progress.step)
        if self.progress.step == 3:
            released.set()
        return stop

    FragmentFile.write, Trainer._one_step = slow_write, step  # type: ignore[method-assign]
    try:
        saving = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 0, "checkpoint.asynchronous": asynchronous}
        _train(_settings("pp2_1f1b", data, run_dir, 5, saving))
    finally:
        FragmentFile.write, Trainer._one_step = write, one_step  # type: ignore[method-assign]
    return {"trained": trained, "met": met[0]}


def start_from(layout: str, data: str, run_dir: str, depth: int, seed: int, overrides: dict[str, Any]) -> None:
    """A new run from another's weights, saved before its first step (as step 0), then trained for two."""
    from mtp_dist.training.trainer import Trainer

    settings = _settings(layout, data, run_dir, 2, overrides)
    settings.mtp.depth, settings.mtp.kind = depth, "sequential" if depth else "none"
    settings.mtp.depth_weights, settings.seed = [], seed
    trainer = Trainer(settings, build_mesh(settings.parallel, torch.device("cpu")), Stop())  # type: ignore[arg-type]
    try:
        trainer.save()
        trainer.run()
    finally:
        trainer.close()


def _next_losses(workload: Workload, config: TrainingRun, steps: range) -> list[float]:
    parts = coefficients(config.mtp, 0)
    found = []
    for step in steps:
        totals, _ = workload.step(_own_rows(config, workload.mesh, step), parts, config.optim.lr)
        found.append(totals.loss)
    return found


def _save(workload: Workload, config: TrainingRun, root: str, tokenizer: str) -> None:
    from mtp_dist.checkpoint.writer import Saver

    saver = Saver(Path(root), config, workload.mesh, workload.engine, Path(tokenizer))
    saver.begin(step=2, progress={}, data={}, tracker={"run_id": "none"})
    saver.finish()


def save_under(layout: str, root: str, tokenizer: str) -> list[float]:
    """A checkpoint after two steps, in root/step_00000002. Returns the losses of the two steps after it."""
    config = configuration(layout)
    workload = build(config, build_mesh(config.parallel, torch.device("cpu")))
    _next_losses(workload, config, range(2))
    _save(workload, config, root, tokenizer)
    return _next_losses(workload, config, range(2, 4))


def load_under(layout: str, checkpoint: str, root: str, tokenizer: str) -> list[float]:
    """That checkpoint under another layout, saved again in root before anything is trained. Returns the same losses."""
    from mtp_dist.checkpoint.reader import Checkpoint

    config = configuration(layout)
    workload = build(config, build_mesh(config.parallel, torch.device("cpu")))
    Checkpoint(Path(checkpoint)).load_engine(workload.engine)
    _save(workload, config, root, tokenizer)
    return _next_losses(workload, config, range(2, 4))
