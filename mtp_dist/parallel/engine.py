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
from mtp_dist.parallel.parameter_groups import HEADS, TRUNK, ordered_groups
from mtp_dist.parallel.sharded_parameters import announce_borrowed, gathered, shard_range, write_shard
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
        sharers: int = 1,
    ) -> None:
        """`replica`: whether a classic pipeline's last chunk holds a copy of the embedding. `sharers`: how many tensor ranks hold
        each key/value head. Parameters that need no gradient are frozen: kept, saved, never changed. With ZeRO-3 they come
        sharded (``initialize_sharded``). Collective."""
        deepspeed = import_deepspeed()
        self.mesh, self.chunks, self.optim, self.stage, self.dtype = mesh, chunks, optim, zero.stage, dtype
        self.parameters = global_parameters(chunks)
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.timeline: Timeline | None = None
        self.replica_of_first = self._mark_replica() if replica and mesh.tied is not None else None
        self._sharers = mesh.sharers(sharers) if sharers > 1 else None
        # Where gradients are sharded there is no pipeline: all ranks lack the same groups, and need nothing in their place.
        groups, self.placeholders = ordered_groups(self.trained, optim, dtype, mesh.device, hold_open=not self.shards_gradients)
        roles = {p: group["role"] for group in groups for p in group["params"]}
        # Fused: one pass over memory, on the CPU too, where it is ten times as fast as the loop. Its result for an element does
        # not depend on how the shards are cut.
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        self.engine, *_ = deepspeed.initialize(
            # ZeRO-3 hooks into the forward pass of the module that it is given.
            model=chunks[0] if self.shards_gradients else nn.ModuleList([*chunks, self.placeholders]),
            optimizer=optimizer,
            config=_settings(optim, zero, dtype, mesh.device, micro_batches, _longest_vector(self.parameters)),
            mpu=mesh.grid,
            dist_init_required=False,
        )
        # With the gradients reduced only on request: the schedule, not DeepSpeed, knows when a step's last backward pass was.
        self.engine.pipeline_parallelism = not self.shards_gradients
        if self.shards_parameters:
            announce_borrowed(chunks[0])
        for p in [*self.trained.values(), *self.placeholders]:
            p.grad_dtype = torch.float32
        if self.shards_gradients:
            # Before DeepSpeed takes them: a parameter's own hook runs before any that waits for its gradient to be there.
            for p in self._seen_in_part():
                p.register_hook(lambda gradient: mesh.tensor.all_reduce(gradient.contiguous().clone()))
            for p in self._shared():
                p.register_hook(self._sum_over_sharers)
        self._states = [self._fresh_state(flat) for flat in self._flats()]
        self._roles = [roles[flat] for flat in self._flats()] if self.stage == 0 else self._roles_of_flats()
        self._frozen_masters = self._hold_frozen()

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
        if self.stage == 0:
            return [*self.trained.values(), *self.placeholders]
        if self.shards_parameters:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _roles_of_flats(self) -> list[str]:
        """Trunk or heads, of each flat shard. ZeRO-3 cuts long groups into several."""
        cut = self.engine.optimizer.sub_group_to_group_id if self.shards_parameters else {}
        return [self._adam.param_groups[cut.get(i, i)]["role"] for i in range(len(self._states))]

    def _hold_frozen(self) -> dict[str, Tensor]:
        """The float32 values of frozen parameters that this rank saves, an equal share for each replica. Where the weights are
        rounded ones, the exact values wait in the host's memory."""
        held = {}
        for name, p in self.parameters.items():
            if p.requires_grad:
                continue
            begin, end = shard_range(p, self.mesh)
            if self.dtype != torch.float32:
                held[name] = torch.zeros(end - begin)
            elif self.shards_parameters:
                held[name] = p.ds_tensor.data[: end - begin]  # type: ignore[attr-defined]
            else:
                held[name] = p.data.view(-1)[begin:end]
        return held

    def _fresh_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state before the first step, made now so that it can be saved and loaded at any time."""
        state: dict[str, Tensor] = self._adam.state[flat]
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
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
        of replicated parameters too (every tensor rank's that holds one, the tied embedding's second one, every replica's where
        the optimizer is not sharded)."""
        for name, p in self.parameters.items():
            if not all_copies and (not spec_of(p).counts_here or getattr(p, "ds_pipe_replicated", False)):
                continue
            if name in self._frozen_masters:
                begin, end = shard_range(p, self.mesh)
                fragment = Fragment(name, begin, end, {"master": self._frozen_masters[name]})
            else:
                found = self._trained_fragment(name, p, all_copies)
                if found is None:
                    continue
                fragment = found
            if fragment.end > fragment.begin:
                yield fragment

    def _trained_fragment(self, name: str, p: nn.Parameter, all_copies: bool) -> Fragment | None:
        if self.stage == 0:
            if self.mesh.data_rank > 0 and not all_copies:
                return None
            state = self._adam.state[p]
            return Fragment(name, 0, p.numel(), {"master": p.data.view(-1), **{m: state[m].view(-1) for m in MOMENTS}})
        if self.shards_parameters:
            optimizer = self.engine.optimizer
            begin, end = shard_range(p, self.mesh)
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        else:
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            begin, end = here.start, here.start + here.numel
            group, offset = mapping.param_group_index, there.start
        flats = {"master": self._flats()[group].data, **{moment: self._states[group][moment] for moment in MOMENTS}}
        return Fragment(name, begin, end, {part: flat.narrow(0, offset, end - begin) for part, flat in flats.items()})

    @torch.no_grad()
    def set_weight(self, name: str, value: Tensor) -> None:
        """The working weight, from this rank's whole float32 slice."""
        p = self.parameters[name]
        if self.shards_parameters:
            write_shard(p, value, self.mesh)
        else:
            p.data.copy_(value.view_as(p))

    def weight(self, name: str) -> Tensor:
        """A copy of the working weight, this rank's whole slice. Collective over replicas."""
        p = self.parameters[name]
        return gathered(p) if self.shards_parameters else p.detach().clone()

    @property
    def optimizer_steps(self) -> dict[str, int]:
        """Steps that AdamW has applied to the trunk and to the heads (its bias correction counts them). A frozen trunk has no
        moments: 0, so that it starts anew when it learns again."""
        steps = {TRUNK: 0, HEADS: 0}
        for role, state in zip(self._roles, self._states, strict=True):
            if role == HEADS or not self._frozen_masters:
                steps[role] = int(state["step"].item())
        return steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: dict[str, int]) -> None:
        for role, state in zip(self._roles, self._states, strict=True):
            state["step"].fill_(steps[role])

    @property
    def shards_gradients(self) -> bool:
        """ZeRO-2 and 3: gradients are reduced and sharded during each backward pass, which ``backward`` must run."""
        return self.stage >= 2

    @property
    def shards_parameters(self) -> bool:
        """ZeRO-3: parameters are gathered where a module runs, which ``forward`` must start."""
        return self.stage == 3

    def forward(self, **rows: Tensor) -> Tensor:
        """One micro-batch's forward pass where gradients are sharded: what the only chunk returns."""
        result: Tensor = self.engine(**rows)
        return result

    def backward(self, loss: Tensor, last: bool) -> None:
        """One micro-batch's backward pass where gradients are sharded in it; `last` of the step's, after which comes ``step``."""
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def complete_gradients(self) -> None:
        """Zeros where there is none: of a depth that was not computed, and of what holds a group open."""
        for p in [*([] if self.shards_gradients else self.trained.values()), *self.placeholders]:
            gradient_of(p)

    def step(self, lr: float) -> StepOutcome:
        """Turn the accumulated gradients into new weights. Collective. Leaves no gradient behind."""
        with span(self.timeline, "reduce"):
            self.complete_gradients()
            self._sum_partial_gradients()
            if self.replica_of_first is not None and self.replica_of_first.requires_grad:
                dist.all_reduce(gradient_of(self.replica_of_first), group=self.mesh.tied)
            if not self.shards_gradients:
                self.engine.allreduce_gradients()
        with span(self.timeline, "optimizer"):
            return self._apply(lr)

    def _apply(self, lr: float) -> StepOutcome:
        """Norm, clipping, AdamW and the gathering of weights, from gradients that are reduced."""
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_ratio"]
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

    def _seen_in_part(self) -> list[nn.Parameter]:
        """Under sequence parallelism a parameter that is whole on each tensor rank has seen that rank's positions only."""
        if not self.mesh.tensor.shares_positions:
            return []
        return [p for p in self.trained.values() if spec_of(p).split is None]

    def _shared(self) -> list[nn.Parameter]:
        """Slices that tensor ranks share: key/value heads, of which each has seen the queries of its own rank only."""
        return [p for p in self.trained.values() if spec_of(p).sharers > 1]

    def _sum_over_sharers(self, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=self._sharers)
        return summed

    def _sum_partial_gradients(self) -> None:
        """Sums of ``_seen_in_part`` over tensor ranks, of ``_shared`` over those that share. Where gradients are sharded, hooks
        of the parameters have done it."""
        if self.shards_gradients:
            return
        for p in self._shared():
            dist.all_reduce(gradient_of(p), group=self._sharers)
        partial = [gradient_of(p) for p in self._seen_in_part()]
        if not partial:
            return
        flat = self.mesh.tensor.all_reduce(torch.cat([gradient.flatten() for gradient in partial]))
        for gradient, summed in zip(partial, flat.split([gradient.numel() for gradient in partial]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _drop_gradients(self) -> None:
        for p in [*self.trained.values(), *self.placeholders]:
            p.grad = None

    def counted(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient this rank adds to the norm: of ranks that hold the same, one."""
        for p in self.trained.values():
            if getattr(p, "ds_pipe_replicated", False):
                continue
            if spec_of(p).counts_here:
                yield p

    def _clip_by_own_norm(self) -> float:
        squares = [gradient_of(p).float().square().sum() for p in self.counted()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.mesh.device)
        dist.all_reduce(total, group=self.mesh.one_replica)
        norm = total.sqrt().item()
        if self.optim.clip > 0 and norm > self.optim.clip:
            for p in self.trained.values():
                if p.grad is not None:
                    p.grad.mul_(self.optim.clip / (norm + 1e-6))
        return norm


def _settings(
    optim: OptimConfig, zero: ZeroConfig, dtype: torch.dtype, device: torch.device, micro_batches: int, longest_vector: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
    }
    if zero.offload:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if zero.stage == 3:
        # A module's parameters go right after it has run; norms, which cost a collective each and no memory, stay.
        stage |= {
            "stage3_prefetch_bucket_size": zero.allgather_bucket_size,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": longest_vector,
            "memory_efficient_linear": False,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches if zero.stage >= 2 else 1,
        # DeepSpeed's default is 1.0. Without ZeRO it misses some parameters under model parallelism: clipped here.
        "gradient_clipping": optim.clip if zero.stage > 0 else 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": stage,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # Micro-batches add up in float32. (With ZeRO-1 the parameters' own gradients do; there this means another optimizer.)
        "data_types": {"grad_accum_dtype": "fp32" if zero.stage >= 2 else None},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW does what DeepSpeed's own one does on the host, without a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }


def _longest_vector(parameters: dict[str, nn.Parameter]) -> int:
    return max((spec.shape[0] for p in parameters.values() if len((spec := spec_of(p)).shape) == 1), default=0)
