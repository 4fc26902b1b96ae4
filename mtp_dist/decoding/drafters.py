"""Which drafter the settings ask for, and how many tokens it drafts a round."""

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.chain import SequentialDrafter
from mtp_dist.decoding.drafter import Drafter
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Chance, Sampling


def draft_length(config: DecodeConfig, depth: int) -> int:
    """γ, drafts verified in one forward: 0 for plain decoding. depth: the model's D."""
    if config.mode == "plain":
        return 0
    return depth if config.draft is None else config.draft


def build_drafter(model: DecodingModel, batch: int, config: DecodeConfig, sampling: Sampling, chance: Chance) -> Drafter:
    """The drafter of a batch that ``config`` asks for."""
    return SequentialDrafter(model, batch, sampling, chance, most=draft_length(config, model.depth))
