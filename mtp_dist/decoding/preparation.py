"""A loaded model made ready to decode, as the settings ask."""

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.model.chunk import Chunk


def prepare(model: Chunk, config: DecodeConfig) -> Chunk:
    """The same model with weights of 8 bits, or compiled blocks, where `config` asks for them; else with fused ones."""
    if not config.int8 and not config.compile:
        from mtp_dist.decoding.fused import fuse

        fuse(model)
    if config.int8:
        from mtp_dist.decoding.int8 import quantize

        quantize(model)
    if config.compile:
        from mtp_dist.decoding.compiled import compile_blocks

        compile_blocks(model)
    return model
