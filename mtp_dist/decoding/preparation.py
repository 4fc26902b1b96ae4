"""A loaded model made ready to decode, as the settings ask."""

from torch.utils._triton import has_triton

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.errors import UserError
from mtp_dist.model.chunk import Chunk


def require_tools(config: DecodeConfig, device: str) -> None:
    """Raise UserError where decode.compile lacks what it compiles with."""
    if config.compile and device == "cpu":
        from torch._inductor import exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise UserError("decode.compile=true needs a C++ compiler, and there is none; install g++, or choose false") from None
    if config.compile and device == "cuda" and not has_triton():
        raise UserError("decode.compile=true needs Triton on CUDA, and it cannot be used here; choose decode.compile=false")


def prepare(model: Chunk, config: DecodeConfig) -> Chunk:
    """The same model with weights of 8 bits, or compiled blocks, where `config` asks for them; else with fused ones, packed where
    the machine has a kernel."""
    if not config.int8 and not config.compile:
        from mtp_dist.decoding.fused import fuse
        from mtp_dist.decoding.product import pack

        fuse(model)
        pack(model)
    if config.int8:
        from mtp_dist.decoding.int8 import quantize

        quantize(model)
    if config.compile:
        from mtp_dist.decoding.compiled import compile_blocks

        compile_blocks(model)
    return model
