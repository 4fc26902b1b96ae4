"""Promise: weights of 8 bits are the rounded ones, fused and compiled blocks the same ones, and decoding stays lossless."""

import copy

import pytest
import torch
import torch._inductor.config

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import int8
from mtp_dist.decoding.engine import generate_batch
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.preparation import prepare, require_tools
from mtp_dist.decoding.request import validate_decoding
from mtp_dist.errors import UserError
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.linear import Linear
from tests.decoding.models import VOCABULARY, random_model

PROMPTS = [[1, 5, 9, 2, 2, 7, 14], [3], [20, 4, 4]]
KINDS = ["sequential", "parallel", "medusa", "eagle"]


def logits(model: Chunk, tokens: torch.Tensor) -> torch.Tensor:
    decoder = DecodingModel(model, 64)
    with torch.inference_mode():
        return decoder.logits(decoder.trunk(tokens, decoder.caches(len(tokens))).after_norm)


def rounded(model: Chunk) -> Chunk:
    """The same model with every linear weight at the nearest of its 255 levels, in float32."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            module.weight.data = torch.round(module.weight / scale) * scale
    return model


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [*KINDS, "eagle3", "notebook"])
def test_fused_blocks_are_the_same(kind: str, dtype: str) -> None:
    model = random_model(2, kind=kind, layers=4, dtype=getattr(torch, dtype))
    tokens = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = logits(model, tokens)
    settings = [DecodeConfig(mode=mode, max_new_tokens=20) for mode in ("plain", "speculative")]
    texts = [[text.tokens for text in generate_batch(model, PROMPTS, config)] for config in settings]
    fused = prepare(model, DecodeConfig(dtype=dtype))
    assert sum(type(module).__name__ == "FusedBlock" for module in fused.modules()) >= 4
    torch.testing.assert_close(logits(fused, tokens), expected, rtol=1e-5, atol=1e-5)
    assert [[text.tokens for text in generate_batch(fused, PROMPTS, config)] for config in settings] == texts


@pytest.mark.parametrize("rows", [1, int8.NARROW + 1], ids=["kernel", "converted"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_the_rounded_model(kind: str, rows: int) -> None:
    model = random_model(2, kind=kind)
    tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(0))
    exact, expected = logits(model, tokens), logits(rounded(model), tokens)
    found = logits(prepare(model, DecodeConfig(int8=True)), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("rows", [1, int8.NARROW + 1], ids=["kernel", "converted"])
def test_int8_in_bfloat16_is_near_the_rounded_model(rows: int) -> None:
    model = random_model(2)
    tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(0))
    expected = logits(rounded(model), tokens)
    found = logits(prepare(model.to(torch.bfloat16), DecodeConfig(int8=True, dtype="bfloat16")), tokens)
    # bfloat16 has 8 bits: each of some twenty roundings on the way to a logit is up to 2^-9 of it.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_lossless_against_itself(kind: str) -> None:
    model = prepare(random_model(2, kind=kind), DecodeConfig(int8=True))
    plain, fast = (
        [text.tokens for text in generate_batch(model, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=20))]
        for mode in ("plain", "speculative")
    )
    assert fast == plain


def test_int8_has_no_kernel_for_float64() -> None:
    with pytest.raises(UserError, match=r"decode\.int8=true .* decode\.dtype=float64; choose"):
        validate_decoding(DecodeConfig(int8=True, dtype="float64"))


def test_compiling_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"decode\.compile=true needs a C\+\+ compiler.*install"):
        require_tools(DecodeConfig(compile=True), "cpu")
    require_tools(DecodeConfig(), "cpu")


@pytest.mark.full
@pytest.mark.parametrize("quantized", [False, True])
def test_compiled_blocks_write_the_same(quantized: bool) -> None:
    config = DecodeConfig(max_new_tokens=20, compile=True, int8=quantized)
    model = random_model(2)
    reference = prepare(copy.deepcopy(model), DecodeConfig(int8=quantized))
    expected = [text.tokens for text in generate_batch(reference, PROMPTS, DecodeConfig(mode="plain", max_new_tokens=20))]
    prepared = prepare(model, config)
    for mode in ("plain", "speculative"):
        assert [text.tokens for text in generate_batch(prepared, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=20))] == expected
    blocks = [module for module in prepared.modules() if type(module).__name__ == "CompiledBlock"]
    assert len(blocks) == 4  # two layers, two modules
