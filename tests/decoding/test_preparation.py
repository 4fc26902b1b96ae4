"""Promise: weights of 8 bits are the rounded ones, packed, fused and compiled ones the same ones, and decoding stays lossless."""

import copy

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding import int8
from mtp_dist.decoding.engine import generate_batch
from mtp_dist.decoding.fused import Norm
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.preparation import prepare, require_tools
from mtp_dist.decoding.product import Product, packable, packed
from mtp_dist.decoding.request import validate_decoding
from mtp_dist.errors import UserError
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.linear import Linear
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.model.trunk import RMSNorm
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


@pytest.mark.parametrize("kind", [*KINDS, "eagle3", "notebook"])
def test_packed_weights_are_the_same(kind: str) -> None:
    """In bfloat16 on a processor with such kernels; on others nothing is packed, and this says nothing new."""
    model = random_model(2, kind=kind, dtype=torch.bfloat16)
    tokens = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = logits(copy.deepcopy(model).float(), tokens)
    before, after = logits(model, tokens), logits(prepare(model, DecodeConfig(dtype="bfloat16")), tokens)
    if packable(model.output_weight()):
        assert packed(model.output_weight()) is not None
        assert not any(isinstance(module, Linear) for module in model.modules())
    off, usual = ((found - expected).abs().max() for found in (after, before))
    assert off <= 1.5 * usual + 0.002 * expected.abs().max(), "farther from float32 than the model as it was"
    for mode in ("plain", "speculative"):
        texts = generate_batch(model, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=20, dtype="bfloat16"))
        assert [len(text.tokens) for text in texts] == [20] * len(PROMPTS)


def test_packed_rows_of_a_draft_vocabulary_are_its_rows() -> None:
    model = random_model(1, kind="eagle", draft_tokens=[2, 3, 11, 22], dtype=torch.bfloat16)
    model = prepare(model, DecodeConfig(dtype="bfloat16"))
    decoder, states = DecodingModel(model, 64), torch.randn(3, 1, model.model.hidden, dtype=torch.bfloat16)
    with torch.inference_mode():
        found, want = decoder.draft_logits(states), decoder.logits(states)[..., [2, 3, 11, 22]]
    assert (packed(decoder.drafted) is not None) == packable(model.output_weight())  # type: ignore[arg-type]
    torch.testing.assert_close(found, want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("shape", [(576, 192), (5, 7)])
def test_a_product_is_a_linear_layer(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    x = torch.randn(2, 3, shape[1], generator=generator)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        given = [tensor.to(dtype) for tensor in (x, weight, bias)]
        for extra in (None, given[2]):
            with torch.inference_mode():
                found = Product(given[1], extra)(given[0])
            want = F.linear(given[0].double(), given[1].double(), None if extra is None else extra.double())
            torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance * shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_the_root_mean_square(dtype: torch.dtype) -> None:
    norm = RMSNorm(24, 1e-5, ALONE).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    for size in (1e-4, 1.0, 1e3):
        x = size * (3 + torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=dtype))
        with torch.inference_mode():
            torch.testing.assert_close(Norm(norm)(x), norm(x))


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


def test_compiling_without_a_compiler_is_one_line() -> None:
    # Torch's own way to change it: pytest's would remove the setting at the end, for the tests after this one, too.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
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
