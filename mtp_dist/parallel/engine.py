"""The optimizer: AdamW under DeepSpeed ZeRO, driven after an outside schedule has left its gradients in the parameters.

The epilogue of a step: sum the tied embedding's gradient over its two copies (classic layouts), reduce over replicas, global
norm, clip, AdamW on the owned shard, gather the weights. DeepSpeed averages over replicas, so the loss it is given must be
multiplied by their number.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_dist.config.schema import OptimConfig, ZeroConfig
from mtp_dist.model.parameter import initial_value, spec_of
from mtp_dist.model.weight_gradients import gradient_of
from mtp_dist.parallel.mesh import Mesh, import_deepspeed
from mtp_dist.parallel.stages import global_parameters
from mtp_dist.parallel.timeline import Timeline, span

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("master", *MOMENTS)
"""What the optimizer keeps of each parameter element: the float32 weight and Adam's two moments."""


@dataclass
class Fragment:
    """The elements [begin, end) of this rank's flattened slice of a parameter that this rank owns, as flat float32 views by
    ``PARTS``."""

    name: str
    begin: int
    end: int
    parts: dict[str, Tensor]


@dataclass
class StepOutcome:
    """`gradient_norm`: global, before clipping, in the units of the reported loss; `applied`: False if the step was not finite
    and left no trace."""

    gradient_norm: float
    applied: bool


class Engine:
    """Owns the parameters' optimizer state. Build it on chunks whose parameters hold their initial values."""

    def __init__(
        self,
        chunks: nn.ModuleList,
        mesh: Mesh,
        optim: OptimConfig,
        zero: ZeroConfig,
        dtype: torch.dtype,
        *,
        replica: bool,
        micro_batches: int,
    ) -> None:
        """`replica`: whether a classic pipeline's last chunk holds a copy of the embedding. Collective."""
        deepspeed = import_deepspeed()
        self.mesh, self.chunks, self.optim, self.stage, self.dtype = mesh, chunks, optim, zero.stage, dtype
        self.parameters = global_parameters(chunks)
        self.timeline: Timeline | None = None
        self.replica_of_first = self._mark_replica() if replica and mesh.tied is not None else None
        optimizer = torch.optim.AdamW(
            _groups(self.parameters, optim),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=mesh.device.type == "cuda",
        )
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches if zero.stage >= 2 else 1,
            # DeepSpeed's default is 1.0. Without ZeRO it misses some parameters under model parallelism: clipped here.
            "gradient_clipping": optim.clip if zero.stage > 0 else 0.0,
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": zero.stage,
                "overlap_comm": False,
                "contiguous_gradients": False,
                "reduce_bucket_size": zero.reduce_bucket_size,
                "allgather_bucket_size": zero.allgather_bucket_size,
            },
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
        }
        self.engine, *_ = deepspeed.initialize(
            model=chunks, optimizer=optimizer, config=config, mpu=mesh.grid, dist_init_required=False
        )
        # With the gradients reduced only on request: the schedule, not DeepSpeed, knows when a step's last backward pass was.
        self.engine.pipeline_parallelism = not self.shards_gradients
        for p in self.parameters.values():
            p.grad_dtype = torch.float32
        self._states = [self._fresh_state(flat) for flat in self._flats()]

    def _mark_replica(self) -> nn.Parameter | None:
        """The embedding that a classic layout keeps on both ends; the last stage's copy is left out of the norm."""
        shared = self.parameters.get("embedding.weight")
        if shared is not None and self.mesh.pipeline_rank > 0:
            shared.ds_pipe_replicated = True  # type: ignore[attr-defined]
        return shared

    @property
    def _adam(self) -> torch.optim.AdamW:
        return self.engine.optimizer.optimizer if self.stage > 0 else self.engine.optimizer

    def _flats(self) -> list[Tensor]:
        """What AdamW sees as its parameters: flat shards under ZeRO, else the parameters themselves."""
        if self.stage > 0:
            return list(self.engine.optimizer.single_partition_of_fp32_groups)
        return list(self.parameters.values())

    def _fresh_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state before the first step, made now so that it can be saved and loaded at any time."""
        state: dict[str, Tensor] = self._adam.state[flat]
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if self.mesh.device.type == "cuda" else "cpu")
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    def write_initial_masters(self, seed: int) -> None:
        """DeepSpeed's masters start as the rounded bfloat16 weights; write the true float32 ones."""
        for fragment in self.fragments(all_copies=True):
            spec = spec_of(self.parameters[fragment.name])
            value = initial_value(fragment.name, spec, seed).flatten()[fragment.begin : fragment.end]
            fragment.parts["master"].copy_(value)

    def fragments(self, *, all_copies: bool = False) -> Iterator[Fragment]:
        """What this rank owns. Each element of each parameter is owned once in the world, unless `all_copies` asks for the copies
        of replicated parameters too (every tensor rank's, the tied embedding's second one, every replica's where the optimizer is
        not sharded)."""
        for name, p in self.parameters.items():
            if not all_copies and (
                (spec_of(p).split is None and self.mesh.tensor.rank > 0)
                or getattr(p, "ds_pipe_replicated", False)
                or (self.stage == 0 and self.mesh.data_rank > 0)
            ):
                continue
            if self.stage == 0:
                state = self._adam.state[p]
                parts = {"master": p.data.view(-1), **{m: state[m].view(-1) for m in MOMENTS}}
                yield Fragment(name, 0, p.numel(), parts)
                continue
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            state = self._states[mapping.param_group_index]
            parts = {"master": mapping.hp_fragment.data, **{m: state[m].narrow(0, there.start, there.numel) for m in MOMENTS}}
            yield Fragment(name, here.start, here.start + here.numel, parts)

    @torch.no_grad()
    def set_weight(self, name: str, value: Tensor) -> None:
        """The working weight, from this rank's whole float32 slice."""
        self.parameters[name].data.copy_(value.view_as(self.parameters[name]))

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has applied (its bias correction counts them)."""
        return int(self._states[0]["step"].item())

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._states:
            state["step"].fill_(steps)

    @property
    def shards_gradients(self) -> bool:
        """ZeRO-2: gradients are reduced and sharded during each backward pass, which ``backward`` must run."""
        return self.stage >= 2

    def backward(self, loss: Tensor, last: bool) -> None:
        """One micro-batch's backward pass where gradients are sharded in it; `last` of the step's, after which comes ``step``."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, lr: float) -> StepOutcome:
        """Turn the accumulated gradients into new weights. Collective. Leaves no gradient behind."""
        with span(self.timeline, "reduce"):
            self._sum_partial_gradients()
            if self.replica_of_first is not None:
                dist.all_reduce(gradient_of(self.replica_of_first), group=self.mesh.tied)
            if not self.shards_gradients:
                self.engine.allreduce_gradients()
        with span(self.timeline, "optimizer"):
            return self._apply(lr)

    def _apply(self, lr: float) -> StepOutcome:
        """Norm, clipping, AdamW and the gathering of weights, from gradients that are reduced."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = self._clip_by_own_norm()
            if not math.isfinite(norm):
                self._drop_gradients()
                return StepOutcome(norm, applied=False)
        self.engine.step()
        if self.stage > 0:
            norm = float(self.engine.get_global_grad_norm())
        self._drop_gradients()
        return StepOutcome(norm, applied=bool(self.engine.was_step_applied()))

    @torch.no_grad()
    def replica_drift(self) -> float:
        """Largest difference between the two copies of the embedding (0 without a replica). Collective over its ranks.

        They get the same gradient and the same update, so anything but 0 is a fault that would grow unseen.
        """
        if self.replica_of_first is None:
            return 0.0
        low, high = self.replica_of_first.detach().clone(), self.replica_of_first.detach().clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.mesh.tied)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.mesh.tied)
        return (high - low).abs().max().item()

    def _sum_partial_gradients(self) -> None:
        """Under sequence parallelism a parameter that is whole on each tensor rank has seen that rank's positions only."""
        if not self.mesh.tensor.shares_positions:
            return
        partial = [gradient_of(p) for p in self.parameters.values() if spec_of(p).split is None]
        flat = self.mesh.tensor.all_reduce(torch.cat([gradient.flatten() for gradient in partial]))
        for gradient, summed in zip(partial, flat.split([gradient.numel() for gradient in partial]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _drop_gradients(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def counted(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient this rank adds to the norm: shards always, replicas once."""
        for p in self.parameters.values():
            if getattr(p, "ds_pipe_replicated", False):
                continue
            if spec_of(p).split is not None or self.mesh.tensor.rank == 0:
                yield p

    def _clip_by_own_norm(self) -> float:
        squares = [gradient_of(p).float().square().sum() for p in self.counted()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.mesh.device)
        dist.all_reduce(total, group=self.mesh.one_replica)
        norm = total.sqrt().item()
        if self.optim.clip > 0 and norm > self.optim.clip:
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad.mul_(self.optim.clip / (norm + 1e-6))
        return norm


def _groups(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay, norms do not. Every rank must list the same groups in the same order: ZeRO's norm is one collective a
    group."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
