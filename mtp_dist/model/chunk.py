"""A chunk: a contiguous slice of the model's layer list, what one pipeline stage runs.

The first chunk looks tokens up, the last one holds the final norm, the MTP heads and the output head. A model in one process is
one chunk that is both. Parameter names are global: chunk 3's layer 7 is `layers.7` in every layout.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.heads import (
    detaches,
    embeds_on_last,
    handed_taps,
    has_adversary,
    learns_inside,
    lookahead,
    order_window,
    owns_embeddings,
    predicts_tokens,
    reads_tokens,
    received_taps,
    soft_targets,
    taps,
)
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.adversary import Adversary
from mtp_dist.model.attention import Mask, build_mask
from mtp_dist.model.draft_tokens import DraftTokens
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.feature_loss import feature_loss
from mtp_dist.model.head_loss import STATISTICS, Order
from mtp_dist.model.mtp import build_heads
from mtp_dist.model.mtp.heads import Feed, TrunkStates
from mtp_dist.model.output import OutputHead, Predictor, TiedHead
from mtp_dist.model.recompute import run_block
from mtp_dist.model.targets import targets, upcoming
from mtp_dist.model.tensor_group import ALONE, TensorGroup
from mtp_dist.model.trunk import Block, RMSNorm, rotation
from mtp_dist.model.weight_gradients import WeightGradients, hand_out

COLUMNS = (*STATISTICS, "feature_sum", "adversary_sum")
"""What the last chunk reports of each depth, sums over a micro-batch: ``STATISTICS``, the part of loss_sum that is
``feature_loss``, and what the discriminator of ``Adversary`` minimises (no part of loss_sum)."""


class Chunk(nn.Module):
    """Layers `layers` of the trunk; `first` adds the embedding before them, `last` the final norm, MTP heads and output head
    after them.

    `embedding` hands in an embedding built elsewhere: in a V placement the first and the last chunk are neighbours on one rank
    and share it. `draft_tokens`: the `mtp.draft_vocabulary` tokens among which the depths draft; a last chunk that has such a
    setting computes nothing without them.
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
        draft_tokens: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None
        assert model.head_dim is not None
        self.model, self.depth, self.group, self.first, self.last = model, mtp.depth, group, first, last
        self.stride, self.ahead = mtp.stride, lookahead(mtp)
        self.detach, self.reads_tokens, self.inside = detaches(mtp), reads_tokens(mtp), learns_inside(mtp)
        self.own_embeddings = owns_embeddings(mtp)
        self.soft, self.cross_entropy_weight = soft_targets(mtp), mtp.cross_entropy_weight
        self.draft_vocabulary, self.window = mtp.draft_vocabulary, order_window(mtp)
        self.draft_tokens: DraftTokens | None = None
        if last and mtp.draft_vocabulary is not None and draft_tokens is not None:
            assert len(set(draft_tokens)) == mtp.draft_vocabulary
            self.draft_tokens = DraftTokens(draft_tokens, model.vocab_size, group)
        needs_embedding = first or (last and embeds_on_last(model, mtp))
        self.embedding: Embedding | None = None
        if needs_embedding:
            self.embedding = embedding or Embedding(model.vocab_size, model.hidden, std=model.init_std, group=group)
        self.layers = nn.ModuleDict({str(i): Block(model, group) for i in layers})
        self.taps, self.received = taps(model, mtp), received_taps(model, mtp, layers)
        self.handed = handed_taps(model, mtp, layers, last=last)
        self.norm = RMSNorm(model.hidden, model.norm_eps, group) if last else None
        self.mtp = build_heads(model, mtp, group) if last else None
        self.adversary = Adversary(model, group) if last and has_adversary(mtp) else None
        self.adversarial = mtp.adversarial
        self.head: OutputHead | None = None
        if last and model.tie_embeddings:
            assert self.embedding is not None
            self.head = TiedHead(self.embedding)
        elif last:
            self.head = OutputHead(model, group)
        self.predictors = self._build_predictors() if last and predicts_tokens(mtp) else None
        self.weight_gradients: WeightGradients | None = None
        self.recompute = "none"
        self.attention = "masked" if model.document_mask else "causal"
        self.compiled = False
        self.forward_calls = 0
        self.computed = mtp.depth

    def _build_predictors(self) -> nn.ModuleList:
        """Entry k names what depth k = 0 .. D-1 predicts."""
        assert self.head is not None
        assert self.mtp is not None
        heads = [self.mtp.projection(k) for k in range(1, self.depth)]
        main = self.head.matrix
        matrices = [main, *(main if head is None else partial(getattr, head, "weight") for head in heads)]
        return nn.ModuleList(Predictor(matrix, self.group) for matrix in matrices)

    def compute(self, depths: int) -> None:
        """From now on only the first so many depths are computed; the statistics of the others are zeros."""
        self.computed = depths
        if self.mtp is not None:
            self.mtp.computed = depths

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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def drafted_tokens(self) -> DraftTokens | None:
        """Those that the depths know; None: all. Only on the last chunk."""
        assert self.draft_vocabulary is None or self.draft_tokens is not None, "mtp.draft_vocabulary without its tokens"
        return self.draft_tokens

    def output_weight(self) -> nn.Parameter:
        """[V/R, d]: the matrix that turns states into logits. Only on the last chunk."""
        assert self.head is not None
        return self.head.matrix()

    def forward(
        self,
        hidden: Tensor | None = None,
        *,
        tokens: Tensor,
        documents: Tensor,
        scale: Tensor,
        starts: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 and documents int [B, S+1+D s] with the stride s (``lookahead`` says how many), scale float32 [B, 1+D]
        (see ``head_loss``); starts: ``document_starts`` of the first S positions, needed where ``attention`` is varlen; own: bool
        [B, S, D], where depth k at position i is fed not the target t[i+1+(k-1) s] of depth k-1 at i but the likeliest token that
        depth k-1 (for k = 1 the main head) predicts there, through which no gradient goes; None: nowhere.

        hidden [B, S, d] (None on the first chunk; S/R positions under sequence parallelism) -> hidden of that shape, each with
        the taps that travel behind it in the last dimension (`states_in` and `states_out` states). The last chunk returns float32
        [1 + 6 (1+D)]: the loss to differentiate, then ``COLUMNS`` of each depth.
        """
        self.forward_calls += 1
        positions = tokens.shape[1] - 1 - self.ahead
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
        wanted = targets(tokens, documents, self.depth, stride=self.stride, inside=self.inside, ahead=self.ahead)
        apart = documents[:, :positions] if self.model.document_mask else None
        trunk = TrunkStates(hidden, normed, self.norm, tapped, apart)
        return self._result(trunk, tokens, documents, wanted, scale, turn, mask, own)

    def _result(
        self,
        trunk: TrunkStates,
        tokens: Tensor,
        documents: Tensor,
        wanted: Tensor,
        scale: Tensor,
        turn: Tensor,
        mask: Mask,
        own: Tensor | None,
    ) -> Tensor:
        """What the last chunk returns."""
        assert self.head is not None
        states, drawn, imitated = [trunk.after_norm], [], None
        if self.mtp is not None and self.computed:
            feed = self._feed(tokens, turn.shape[1], own)
            if self.detach:
                trunk = self._detached(trunk)
            drawn, imitated = self.mtp(trunk, feed, turn, mask), self.mtp.imitated(trunk)
            states += [self.mtp.ready(state, trunk) for state in drawn]
        wanted, scale = wanted[..., : len(states)], scale[:, : len(states)]
        of_head = scale
        if imitated is not None:
            distance, distances = feature_loss(drawn, imitated, wanted, scale, self.group)
            of_head = torch.cat((scale[:, :1], scale[:, 1:] * self.cross_entropy_weight), dim=1)
        states = [self.group.enter(state) for state in states]
        order = Order(*upcoming(tokens, documents, self.window)) if self.window else None
        loss, statistics = self.head(
            states, wanted=wanted, scale=of_head, queue=self.weight_gradients, main_only=self.detach, soft=self.soft,
            kept=self.drafted_tokens(), own=self.mtp.projections() if self.mtp is not None else (), order=order,
        )
        columns = F.pad(statistics, (0, len(COLUMNS) - len(STATISTICS)))
        if imitated is not None:
            loss = loss + distance
            columns[1:, COLUMNS.index("loss_sum")] *= self.cross_entropy_weight
            for column in ("loss_sum", "feature_sum"):
                columns[1:, COLUMNS.index(column)] += distances
        if self.adversary is not None:
            game, told = self.adversary(states, wanted, scale)
            loss = loss + self.adversarial * game
            columns[: len(told), COLUMNS.index("adversary_sum")] = told
        return torch.cat((loss.view(1), F.pad(columns, (0, 0, 0, 1 + self.depth - len(states))).flatten()))

    def _detached(self, trunk: TrunkStates) -> TrunkStates:
        """The same states as constants, and a norm that does not learn."""
        assert self.norm is not None
        return TrunkStates(
            trunk.before_norm.detach(),
            trunk.after_norm.detach(),
            partial(self.norm, learn=False),
            {tap: state.detach() for tap, state in trunk.taps.items()},
            trunk.documents,
        )

    def _feed(self, tokens: Tensor, positions: int, own: Tensor | None) -> Feed:
        """What the depths read; `own`: as of ``forward``."""
        if own is None and not self.own_embeddings:
            embedded = self._embed_ahead(tokens, positions)
            return lambda k, _: embedded[k - 1].detach() if self.detach else embedded[k - 1]

        def feed(k: int, state: Tensor) -> Tensor:
            assert self.mtp is not None
            begin = 1 + (k - 1) * self.stride
            fed = tokens[:, begin : begin + positions]
            if own is not None:
                assert self.predictors is not None
                fed = torch.where(own[..., k - 1], self.predictors[k - 1](state), fed)
            if (embedding := self.mtp.embedding(k)) is not None:
                return embedding(fed)
            assert self.embedding is not None
            return self.embedding(fed).detach() if self.detach else self.embedding(fed)

        return feed

    def _embed_ahead(self, tokens: Tensor, positions: int) -> list[Tensor]:
        """Emb(t[i+1+(k-1) s]) for each depth k that is computed, where the kind of head reads tokens. Tokens are shifted before
        they are embedded: an embedding may be a share of the positions."""
        if not self.reads_tokens:
            return []
        assert self.embedding is not None
        shifts = range(0, self.computed * self.stride, self.stride)
        if self.group.shares_positions:
            return [self.embedding(tokens[:, 1 + shift : 1 + shift + positions]) for shift in shifts]
        once = self.embedding(tokens[:, 1 : 1 + shifts[-1] + positions])
        return [once[:, shift : shift + positions] for shift in shifts]

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
        return 1 + len(COLUMNS) * (1 + self.depth)
