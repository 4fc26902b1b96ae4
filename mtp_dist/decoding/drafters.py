"""Which drafter the settings ask for, and how many tokens it drafts a round."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.branching import Branching, ChainBranching, ModelBranching, ParallelBranching, PointBranching
from mtp_dist.decoding.chain import ChainDrafter, chain_of
from mtp_dist.decoding.drafter import Drafter
from mtp_dist.decoding.hugging_face import HuggingFaceDrafter
from mtp_dist.decoding.layout import Announced, LayoutModel
from mtp_dist.decoding.lookup import LookupDrafter
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Sampling, Source
from mtp_dist.decoding.side_by_side import ParallelDrafter, PointDrafter
from mtp_dist.decoding.small_model import ModelDrafter
from mtp_dist.decoding.tree_drafter import TreeDrafter, dynamic, static
from mtp_dist.decoding.tree_shape import deepest, default_shape
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.medusa import MedusaHeads
from mtp_dist.model.mtp.notebook import NotebookHeads
from mtp_dist.model.mtp.parallel import ParallelHeads

T = TypeVar("T")


@dataclass(frozen=True)
class ByHeads(Generic[T]):
    """What drafts with each kind of heads: chains, those of Gloeckle, those of one state."""

    chained: Callable[..., T]
    parallel: Callable[..., T]
    pointed: Callable[..., T]

    def build(self, model: DecodingModel, batch: int, sampling: Sampling, source: Source, *, most: int) -> T:
        """The one for the heads that the model has."""
        heads, chain = model.heads, chain_of(model)
        if chain is not None:
            return self.chained(model, chain, batch, sampling, source, most=most)
        if isinstance(heads, ParallelHeads):
            return self.parallel(model, heads, batch, sampling, source, most=most)
        assert isinstance(heads, MedusaHeads | NotebookHeads)
        return self.pointed(model, heads, sampling, source)


DRAFTERS = ByHeads[Drafter](ChainDrafter, ParallelDrafter, PointDrafter)
BRANCHINGS = ByHeads[Branching](ChainBranching, ParallelBranching, PointBranching)

WITHOUT_DEPTH = 4
"""Drafts a round of a drafter that has no depth, unless the settings say."""


def draft_length(config: DecodeConfig, depth: int) -> int:
    """γ, drafts verified in one forward: 0 for plain decoding. depth: the model's D."""
    if config.mode == "plain":
        return 0
    if config.draft is not None:
        return config.draft
    if config.tree == "static" and config.tree_shape:
        return deepest(config.tree_shape)
    return depth if config.drafter == "heads" else WITHOUT_DEPTH


def most_nodes(config: DecodeConfig, depth: int) -> int:
    """Drafts verified in one forward at most: those of the tree, or γ."""
    length = draft_length(config, depth)
    if not length or config.tree == "none":
        return length
    if config.tree == "static":
        return len(static_shape(config, depth))
    # Depth 1 has `tree_width` candidates, every other one that many times as many.
    return min(config.tree_nodes, config.tree_width + (length - 1) * config.tree_width**2)


def room(config: DecodeConfig, depth: int) -> int:
    """Positions that caches need behind a text for the drafts of a round."""
    grown = config.tree_width * draft_length(config, depth) if config.tree == "dynamic" else 0
    return max(most_nodes(config, depth), grown)


def static_shape(config: DecodeConfig, depth: int) -> list[tuple[int, ...]]:
    """Paths of the static tree."""
    if config.tree_shape:
        return [tuple(path) for path in config.tree_shape]
    return default_shape(draft_length(config, depth), config.tree_nodes, config.tree_width)


def build_drafter(
    model: DecodingModel, batch: int, config: DecodeConfig, sampling: Sampling, source: Source, *, other: nn.Module | None = None
) -> Drafter:
    """The drafter that ``config`` asks for. ``other``: the model that drafts, where it is to be another, one of ours or of
    `transformers`; of ranks that decode together only the one that decides needs it."""
    if isinstance(model, LayoutModel):
        drafts = model.chunk.last if config.drafter == "heads" else model.leads
        return Announced(model, _own_drafter(model, batch, config, sampling, source, other) if drafts else None)
    return _own_drafter(model, batch, config, sampling, source, other)


def _own_drafter(
    model: DecodingModel, batch: int, config: DecodeConfig, sampling: Sampling, source: Source, other: nn.Module | None
) -> Drafter:
    if config.tree != "none":
        most = draft_length(config, model.depth)
        branching = build_branching(model, batch, sampling, source, most=most, other=other if config.drafter == "model" else None)
        if config.tree == "static":
            return TreeDrafter(branching, static(static_shape(config, model.depth), sampling, source))
        return TreeDrafter(branching, dynamic(config.tree_nodes, config.tree_width, sampling, source))
    if config.drafter == "ngram":
        return LookupDrafter(config.ngram)
    if config.drafter == "model":
        if other is None:
            raise ValueError("decode.drafter=model without a model")
        if isinstance(other, Chunk):
            return ModelDrafter(model.beside(other), batch, sampling, source)
        return HuggingFaceDrafter(model, other, batch, sampling, source)
    return head_drafter(model, batch, sampling, source, most=draft_length(config, model.depth))


def build_branching(
    model: DecodingModel, batch: int, sampling: Sampling, source: Source, *, most: int, other: nn.Module | None = None
) -> Branching:
    """What drafts a tree's nodes: another model of ours, or the model's own heads. ``most``: the greatest depth."""
    if other is not None:
        assert isinstance(other, Chunk)
        return ModelBranching(model.beside(other), batch, sampling, source)
    return BRANCHINGS.build(model, batch, sampling, source, most=most)


def head_drafter(model: DecodingModel, batch: int, sampling: Sampling, source: Source, *, most: int) -> Drafter:
    """The drafter of the model's own heads. ``most``: the largest count that will be asked for."""
    return DRAFTERS.build(model, batch, sampling, source, most=most)
