"""What all kinds of MTP heads have in common: the interface, and a module's blocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from mtp_dist.config.heads import modules
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.output import OwnProjection
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


class Heads(nn.ModuleDict):
    """Modules keyed "1" .. "D", or "1" alone where one serves every depth. `computed`: how many depths are asked for, D unless a
    curriculum says fewer."""

    def __init__(self, modules: Mapping[str, nn.Module], depth: int) -> None:
        super().__init__(modules)
        self.computed = depth

    def asked(self) -> list[nn.Module]:
        """The module of each depth that is asked for."""
        return [self[str(min(k, len(self)))] for k in range(1, self.computed + 1)]

    def forward(self, trunk: TrunkStates, embedded: Sequence[Tensor], turn: Tensor, mask: Mask) -> list[Tensor]:
        """embedded: Emb(t[i+k]) [B, S, d] for each depth k that is asked for, or none where the kind reads no tokens -> as many
        states [B, S, d]."""
        raise NotImplementedError

    def ready(self, state: Tensor, trunk: TrunkStates) -> Tensor:
        """A state of any depth as the shared output head reads it."""
        return state

    def imitated(self, trunk: TrunkStates) -> Tensor | None:
        """The trunk's states [B, S, d] that those of depth k at position i are taught to equal at i + k; None: none are."""
        return None

    def projections(self) -> list[OwnProjection]:
        """The vocabulary projection of each depth, where they do not share the main head's."""
        return []


def numbered(
    module: Callable[[ModelConfig, MTPConfig, TensorGroup], nn.Module], model: ModelConfig, mtp: MTPConfig, group: TensorGroup
) -> dict[str, nn.Module]:
    """A module for each depth, keyed "1" .. "D", or one alone."""
    return {str(k): module(model, mtp, group) for k in range(1, modules(mtp) + 1)}


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
