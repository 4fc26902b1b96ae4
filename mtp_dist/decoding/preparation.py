"""What the settings of decoding change in a loaded model."""

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.model.chunk import Chunk


def prepare(model: Chunk, config: DecodeConfig) -> Chunk:
    """The same model with weights of 8 bits, or compiled blocks, where `config` asks for them."""
    if config.int8:
        from mtp_dist.decoding.int8 import quantize

        quantize(model)
    if config.compile:
        from mtp_dist.decoding.compiled import compile_blocks

        compile_blocks(model)
    return model
