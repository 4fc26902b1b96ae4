"""The rival: the same model as layers of DeepSpeed's own ``PipelineModule`` (1F1B) or ``DualPipeVModule``.

Blocks, MTP modules, head loss and initial weights are this project's; partition, schedule and communication are DeepSpeed's,
weight gradients plain autograd's. The embedding is one tied layer with three uses: look-up, look-up of the tokens ahead for the
MTP modules, and output head. What travels between stages in the trunk is one float tensor, and the token ids: DeepSpeed runs a
backward pass for each float tensor, so a cut inside the tail would cost more.
"""

import contextlib
import io
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch import Tensor, nn

from mtp_dist.config.layout import micro_batches
from mtp_dist.config.schema import ModelConfig, MTPConfig, TrainingRun
from mtp_dist.data.batch import Batch
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.head_loss import head_loss
from mtp_dist.model.mtp.sequential import SequentialModule
from mtp_dist.model.parameter import initial_value, spec_of
from mtp_dist.model.targets import targets, valid_counts
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.model.trunk import Block, RMSNorm, rotation
from mtp_dist.training.objective import coefficients, target_scale

Carry = tuple[Tensor, ...]
"""State or states, then the token ids [B, S+1+D]."""


@torch.no_grad()
def _initialize(module: nn.Module, prefix: str, seed: int) -> None:
    for name, p in module.named_parameters():
        p.copy_(initial_value(f"{prefix}.{name}", spec_of(p), seed))


class _Table(Embedding):
    def __init__(self, model: ModelConfig, seed: int) -> None:
        assert model.vocab_size is not None
        super().__init__(model.vocab_size, model.hidden, std=model.init_std, group=ALONE)
        _initialize(self, "embedding", seed)


class _Layer(Block):
    def __init__(self, model: ModelConfig, number: int, turn: Tensor, seed: int) -> None:
        super().__init__(model)
        self.turn = turn
        _initialize(self, f"layers.{number}", seed)

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        hidden, tokens = carry
        return super().forward(hidden, self.turn, None), tokens


class _FinalNorm(RMSNorm):
    def __init__(self, model: ModelConfig, seed: int) -> None:
        super().__init__(model.hidden, model.norm_eps, ALONE)
        _initialize(self, "norm", seed)

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        hidden, tokens = carry
        return super().forward(hidden), tokens


class _Depth(SequentialModule):
    """carry: states of depths 0 .. k-1, embeddings ahead of k .. D, tokens."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, depth: int, turn: Tensor, seed: int) -> None:
        super().__init__(model, mtp, ALONE)
        self.depth, self.turn = depth, turn
        _initialize(self, f"mtp.{depth}", seed)

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        k = self.depth
        state, _ = super().forward(carry[k - 1], carry[k], self.turn, None)
        return (*carry[:k], state, *carry[k + 1 :])


def _layers(config: TrainingRun) -> list[LayerSpec]:
    model, mtp, seed = config.model, config.mtp, config.seed
    assert model.head_dim is not None
    # A state that is handed on both normed and not would be a second float tensor.
    assert (mtp.h0, mtp.recycle) == ("post_norm", "post_norm")
    positions, count = config.train.sequence_length, micro_batches(config)
    turn = rotation(torch.arange(positions), model.head_dim, model.rope_theta)

    def look_up(table: Embedding, tokens: Tensor) -> Carry:
        return table(tokens[:, :positions]), tokens

    def look_ahead(table: Embedding, carry: Carry) -> Carry:
        normed, tokens = carry
        once = table(tokens[:, 1 : positions + mtp.depth])
        return (normed, *(once[:, k : k + positions] for k in range(mtp.depth)), tokens)

    def loss(table: Embedding, carry: Carry) -> Tensor:
        *states, tokens = carry
        wanted = targets(tokens, torch.zeros_like(tokens), mtp.depth)
        # Every row is one document. DeepSpeed takes the mean over micro-batches, so each reports its share times their number.
        counts = valid_counts(wanted) * count
        scale = target_scale(coefficients(mtp, 0), counts, replicas=1).expand(len(tokens), -1) * count
        return head_loss(list(states), table.weight, wanted, scale, ALONE, None)[0]

    return [
        TiedLayerSpec("embedding", _Table, model, seed, forward_fn=look_up),
        *(LayerSpec(_Layer, model, number, turn, seed) for number in range(model.layers)),
        LayerSpec(_FinalNorm, model, seed),
        *([TiedLayerSpec("embedding", _Table, model, seed, forward_fn=look_ahead)] if mtp.depth else []),
        *(LayerSpec(_Depth, model, mtp, k, turn, seed) for k in range(1, mtp.depth + 1)),
        TiedLayerSpec("embedding", _Table, model, seed, forward_fn=loss),
    ]


def cut_after(config: TrainingRun, *trunk_layers: int) -> list[int]:
    """Stage boundaries in DeepSpeed's layer list that leave the first so many trunk layers before each cut."""
    return [0, *(1 + layers for layers in trunk_layers), len(_layers(config))]


class Rival:
    """DeepSpeed's engine on its own partition ('parameters', its default) or on explicit stage boundaries."""

    def __init__(self, config: TrainingRun, batch: Batch, boundaries: list[int] | None = None, *, v: bool = False) -> None:
        base = DualPipeVModule if v else PipelineModule

        class Partitioned(base):  # type: ignore[misc, valid-type]
            def _partition_layers(self, method: str = "parameters") -> None:
                super()._partition_layers(method)
                if boundaries is None:
                    return
                self.parts = boundaries
                self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])
                if v:
                    mirror = self.num_stages - 1 - self.stage_id
                    self.phase_bounds = [(self._local_start, self._local_stop), (self.parts[mirror], self.parts[mirror + 1])]

        with contextlib.redirect_stdout(io.StringIO()):  # it prints every layer
            module = Partitioned(layers=_layers(config), num_stages=config.parallel.pipeline)
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=_optimizer(module, config), config=_settings(config), dist_init_required=False
            )
        self.boundaries = [int(edge) for edge in module.parts]
        self.micro: list[Any] = [(part, part) for part in batch.tokens.split(config.train.micro_batch)]

    def step(self) -> float:
        """One optimizer step; its loss, before the update."""
        return float(self.engine.train_batch(iter(self.micro)))


def _optimizer(module: nn.Module, config: TrainingRun) -> torch.optim.AdamW:
    optim, parameters = config.optim, list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def _settings(config: TrainingRun) -> dict[str, Any]:
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": micro_batches(config),
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
