"""A chunk: a contiguous slice of the model's layer list, what one pipeline stage runs.

The first chunk looks tokens up, the last one holds the final norm, the MTP heads and the output head. A model in one process is
one chunk that is both. Parameter names are global: chunk 3's layer 7 is `layers.7` in every layout.
"""

from functools import partial

import torch
from torch import Tensor, nn

from mtp_dist.config.heads import (
    embeds_on_last,
    handed_taps,
    learns_inside,
    reads_tokens,
    received_taps,
    soft_targets,
    taps,
)
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask, build_mask
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.head_loss import STATISTICS
from mtp_dist.model.mtp import build_heads
from mtp_dist.model.mtp.heads import TrunkStates
from mtp_dist.model.output import OutputHead, TiedHead
from mtp_dist.model.recompute import run_block
from mtp_dist.model.targets import targets
from mtp_dist.model.tensor_group import ALONE, TensorGroup
from mtp_dist.model.trunk import Block, RMSNorm, rotation
from mtp_dist.model.weight_gradients import WeightGradients, hand_out


class Chunk(nn.Module):
    """Layers `layers` of the trunk; `first` adds the embedding before them, `last` the final norm, MTP heads and output head
    after them.

    `embedding` hands in an embedding built elsewhere: in a V placement the first and the last chunk are neighbours on one rank
    and share it.
    """

    def __init__(
        self,
        model: ModelConfig,
        mtp: MTPConfig,
        layers: range,
        *,
        first: bool = True,
        last: bool = True,
        group: TensorGroup = ALONE,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        assert model.head_dim is not None
        self.model, self.depth, self.group, self.first, self.last = model, mtp.depth, group, first, last
        self.detach, self.reads_tokens, self.inside = mtp.detach, reads_tokens(mtp), learns_inside(mtp)
        self.soft = soft_targets(mtp)
        needs_embedding = first or (last and embeds_on_last(model, mtp))
        self.embedding: Embedding | None = None
        if needs_embedding:
            self.embedding = embedding or Embedding(model.vocab_size, model.hidden, std=model.init_std, group=group)
        self.layers = nn.ModuleDict({str(i): Block(model, group) for i in layers})
        self.taps, self.received = taps(model, mtp), received_taps(model, mtp, layers)
        self.handed = handed_taps(model, mtp, layers, last=last)
        self.norm = RMSNorm(model.hidden, model.norm_eps, group) if last else None
        self.mtp = build_heads(model, mtp, group) if last else None
        self.head: OutputHead | None = None
        if last and model.tie_embeddings:
            assert self.embedding is not None
            self.head = TiedHead(self.embedding)
        elif last:
            self.head = OutputHead(model, group)
        self.weight_gradients: WeightGradients | None = None
        self.recompute = "none"
        self.attention = "masked" if model.document_mask else "causal"
        self.compiled = False
        self.forward_calls = 0

    def defer_weight_gradients(self, queue: WeightGradients | None) -> None:
        """From now on weight gradients wait in the queue after each backward pass (those of compiled blocks do not); None:
        autograd forms them in it."""
        self.weight_gradients = queue
        hand_out(self, queue)
        if self.compiled:
            for block in self._blocks():
                hand_out(block, None)

    def compile_blocks(self) -> None:
        """From now on ``torch.compile`` runs every block of the trunk and the MTP modules; call before
        ``defer_weight_gradients``. Blocks are alike, so they share a graph for training and one for evaluation.

        A queue is a side effect that cannot be traced: compiled blocks leave their weight gradients to autograd, which adds them
        up in ``grad_dtype`` as the queue would. Where no graph can be made (a gradient of another dtype than its parameter is
        there already) the block runs uncompiled.
        """
        self.compiled = True
        for block in self._blocks():
            block.compile(dynamic=False)

    def _blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def output_weight(self) -> nn.Parameter:
        """[V/R, d]: the matrix that turns states into logits. Only on the last chunk."""
        assert self.head is not None
        return self.head.matrix()

    def forward(
        self, hidden: Tensor | None = None, *, tokens: Tensor, documents: Tensor, scale: Tensor, starts: Tensor | None = None
    ) -> Tensor:
        """tokens int64 and documents int [B, S+1+D], scale float32 [B, 1+D] (see ``head_loss``); starts: ``document_starts`` of
        the first S positions, needed where ``attention`` is varlen.

        hidden [B, S, d] (None on the first chunk; S/R positions under sequence parallelism) -> hidden of that shape, each with
        the taps that travel behind it in the last dimension (`states_in` and `states_out` states). The last chunk returns float32
        [1 + 4 (1+D)]: the loss to differentiate, then ``STATISTICS`` of each depth.
        """
        self.forward_calls += 1
        positions = tokens.shape[1] - 1 - self.depth
        if self.first:
            assert self.embedding is not None
            hidden = self.embedding(tokens[:, :positions])
        assert hidden is not None
        hidden, *earlier = hidden.chunk(self.states_in, dim=-1)
        tapped = dict(zip(self.received, earlier, strict=True))
        assert self.model.head_dim is not None
        turn = rotation(torch.arange(positions, device=hidden.device), self.model.head_dim, self.model.rope_theta)
        mask = build_mask(self.attention, documents[:, :positions], starts)
        for number, block in self.layers.items():
            if int(number) in self.taps:
                tapped[int(number)] = hidden
            assert isinstance(block, Block)
            hidden = run_block(block, hidden, turn, mask, self.recompute)
        assert hidden is not None
        if not self.last:
            return torch.cat((hidden, *(tapped[tap] for tap in self.handed)), dim=-1) if self.handed else hidden
        assert self.norm is not None
        normed = self.norm(hidden)
        states = [normed]
        if self.mtp is not None:
            states += self._head_states(TrunkStates(hidden, normed, self.norm, tapped), tokens, turn, mask)
        states = [self.group.enter(state) for state in states]
        assert self.head is not None
        wanted = targets(tokens, documents, self.depth, inside=self.inside)
        loss, statistics = self.head(
            states, wanted=wanted, scale=scale, queue=self.weight_gradients, main_only=self.detach, soft=self.soft,
            own=self.mtp.projections() if self.mtp is not None else (),
        )
        return torch.cat((loss.view(1), statistics.flatten()))

    def _head_states(self, trunk: TrunkStates, tokens: Tensor, turn: Tensor, mask: Mask) -> list[Tensor]:
        """The MTP modules on the trunk's states -> D states [B, S, d]."""
        assert self.mtp is not None
        assert self.norm is not None
        embedded = self._embed_ahead(tokens, turn.shape[1])
        if not self.detach:
            return self.mtp(trunk, embedded, turn, mask)
        detached = TrunkStates(
            trunk.before_norm.detach(),
            trunk.after_norm.detach(),
            partial(self.norm, learn=False),
            {tap: state.detach() for tap, state in trunk.taps.items()},
        )
        return self.mtp(detached, [part.detach() for part in embedded], turn, mask)

    def _embed_ahead(self, tokens: Tensor, positions: int) -> list[Tensor]:
        """Emb(t[i+k]) for each depth k, where the kind of head reads tokens. Tokens are shifted before they are embedded: an
        embedding may be a share of the positions."""
        if not self.reads_tokens:
            return []
        assert self.embedding is not None
        if self.group.shares_positions:
            return [self.embedding(tokens[:, k : k + positions]) for k in range(1, self.depth + 1)]
        once = self.embedding(tokens[:, 1 : positions + self.depth])
        return [once[:, k : k + positions] for k in range(self.depth)]

    @property
    def states_in(self) -> int:
        """States that arrive: the hidden one, and taps."""
        return 1 + len(self.received)

    @property
    def states_out(self) -> int:
        """States that a chunk which is not the last hands on."""
        return 1 + len(self.handed)

    def result_size(self) -> int:
        """Elements of what the last chunk returns."""
        return 1 + len(STATISTICS) * (1 + self.depth)
