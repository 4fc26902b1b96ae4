"""What all kinds of MTP heads have in common: the interface, and a module's blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mtp_dist.config.heads import modules, owns_embeddings, owns_projections
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.output import MATRIX, OwnProjection
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.trunk import Block, KeyValueCache


@dataclass(frozen=True)
class TrunkStates:
    """What heads read of the trunk, each [B, S, d]: its output before and after the final norm, and that norm; `taps`: the state
    that enters a layer, for each that the kind names; `documents`: int [B, S], all positions, None where attention crosses
    them."""

    before_norm: Tensor
    after_norm: Tensor
    norm: Callable[[Tensor], Tensor]
    taps: dict[int, Tensor] = field(default_factory=dict)
    documents: Tensor | None = None


Feed = Callable[[int, Tensor], Tensor]
"""(k, the state of depth k-1 that an output head reads, h⁰ after its norm for k = 1) -> what depth k reads, both [B, S, d]: the
embedding of the target of depth k-1, or of the model's own prediction of it."""


class Heads(nn.ModuleDict):
    """Modules keyed "1" .. "D", or "1" alone where one serves every depth. `computed`: how many depths are asked for, D unless a
    curriculum says fewer. A module may have a vocabulary projection `head` and an `embedding` of its own."""

    def __init__(self, modules: Mapping[str, nn.Module], depth: int) -> None:
        super().__init__(modules)
        self.computed = depth

    def asked(self) -> list[nn.Module]:
        """The module of each depth that is asked for."""
        return [self.of_depth(k) for k in range(1, self.computed + 1)]

    def of_depth(self, k: int) -> nn.Module:
        """The module that serves depth k >= 1; beyond the last one, that one."""
        return self[str(min(k, len(self)))]

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        """feed: asked once for each depth that is asked for, in order, by a kind that reads tokens -> the state [B, S, d] of each
        depth that is asked for."""
        raise NotImplementedError

    def ready(self, state: Tensor, trunk: TrunkStates) -> Tensor:
        """A state of any depth as the shared output head reads it."""
        return state

    def imitated(self, trunk: TrunkStates) -> Tensor | None:
        """The trunk's states [B, S, d] that those of depth k at position i are taught to equal at i + k; None: none are."""
        return None

    def projection(self, k: int) -> OwnProjection | None:
        """The vocabulary projection of depth k, where it is not the main head's."""
        found: OwnProjection | None = getattr(self.of_depth(k), "head", None)
        return found

    def embedding(self, k: int) -> Embedding | None:
        """The embedding that depth k reads, where it is not the trunk's."""
        found: Embedding | None = getattr(self.of_depth(k), "embedding", None)
        return found

    def projections(self) -> list[OwnProjection]:
        """The vocabulary projection of each depth that is asked for, where they do not share the main head's."""
        found = (self.projection(k) for k in range(1, self.computed + 1))
        return [projection for projection in found if projection is not None]


def numbered(
    module: Callable[[ModelConfig, MTPConfig, TensorGroup], nn.Module], model: ModelConfig, mtp: MTPConfig, group: TensorGroup
) -> dict[str, nn.Module]:
    """A module for each depth, keyed "1" .. "D", or one alone."""
    return {str(k): module(model, mtp, group) for k in range(1, modules(mtp) + 1)}


def own_projection(model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> OwnProjection | None:
    """A module's own output matrix, random at the start, where the settings ask for it."""
    return OwnProjection(model, group, stands_for=MATRIX[model.tie_embeddings]) if owns_projections(mtp) else None


def own_embedding(model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> Embedding | None:
    """A module's own embedding, random at the start, where the settings ask for it."""
    if not owns_embeddings(mtp):
        return None
    assert model.vocab_size is not None
    return Embedding(model.vocab_size, model.hidden, std=model.init_std, group=group, stands_for=MATRIX[True])


class Blocks(nn.ModuleDict):
    """Several blocks in a row, keyed "1" .. "K"."""

    def forward(self, x: Tensor, turn: Tensor, mask: Mask, cache: KeyValueCache | None = None) -> Tensor:
        """As ``Block``; each block in turn extends the cache."""
        for block in self.values():
            x = block(x, turn, mask, cache)
        return x


def build_blocks(model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> Block | Blocks:
    """The `mtp.blocks` blocks of one module; one is itself, without a number in its name."""
    if mtp.blocks == 1:
        return Block(model, group)
    return Blocks({str(number): Block(model, group) for number in range(1, mtp.blocks + 1)})
