"""A run in which some steps are not finite."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.errors import UserError
from mtp_dist.parallel.mesh import build_mesh
from tests.distributed.tasks.runs import Stop, settings_of_run
from tests.distributed.tasks.step import storage


def nonfinite(
    layout: str, data: str, run_dir: str, steps: int, at: list[int], kind: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Train with the steps of `at` made non-finite (see ``_poison``). Returns the error, what each step did, and the end."""
    from mtp_dist.training.trainer import Trainer

    config = settings_of_run(layout, data, run_dir, steps, overrides)
    trainer: Any = Trainer(config, build_mesh(config.parallel, torch.device("cpu")), Stop())  # type: ignore[arg-type]
    _poison(trainer, at, kind)
    seen: list[dict[str, Any]] = []
    step_once = trainer.workload.step

    def step(batch: Any, parts: list[float], lr: float, *more: Any) -> Any:
        before = _state(trainer)
        totals, outcome = step_once(batch, parts, lr, *more)
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


def _poison(trainer: Any, at: list[int], kind: str) -> None:
    """Make the steps of `at` non-finite. "gradient": one element of it, on the last rank alone; "loss": a weight is infinite
    during forward and backward, and put back before the optimizer sees it."""
    workload, compute = trainer.workload, trainer.workload.gradients
    engine = workload.engine
    victim = storage(next(p for name, p in engine.parameters.items() if name.endswith("mlp.down.weight")), engine)

    def gradients(*arguments: Any) -> Any:
        now = trainer.progress.step + 1 in at
        sound = victim.detach().clone()
        if now and kind == "loss":
            victim.data.view(-1)[0] = torch.inf
        totals = compute(*arguments)
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
    found = {name: storage(p, engine).detach().clone() for name, p in engine.parameters.items()}
    for fragment in engine.fragments():
        for part, value in fragment.parts.items():
            found[f"{fragment.name}.{part}"] = value.detach().clone()
    found["optimizer_steps"] = torch.tensor(list(engine.optimizer_steps.values()))
    return found
