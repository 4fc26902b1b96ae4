"""Variants of equal size: the trunk's feed-forward width that gives the whole model a wanted number of parameters. No torch."""

import copy

from mtp_dist.config.schema import Study
from mtp_dist.errors import UserError
from mtp_dist.parallel.budget import chunk_parameters

STRIDE = 8
"""Widths tried are multiples of it."""


def parameters(config: Study) -> int:
    """Of the whole model, embedding included, once."""
    return chunk_parameters(config.model, config.mtp, config.model.layers).total


def matched(config: Study) -> Study:
    """A copy of resolved settings with `model.mlp` as `parameters` asks for. Raises UserError where no width comes near."""
    wanted = config.parameters
    if wanted is None:
        return config
    full = copy.deepcopy(config)
    full.model.mlp = STRIDE
    least = parameters(full)
    full.model.mlp = 2 * STRIDE
    each = parameters(full) - least
    steps = round((wanted - least) / each)
    if steps < 0:
        raise UserError(
            f"parameters={wanted} is less than the {least} with the smallest model.mlp={STRIDE}; choose more, or fewer layers"
        )
    full.model.mlp = STRIDE * (1 + steps)
    return full
