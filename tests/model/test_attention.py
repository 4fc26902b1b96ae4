"""Promise: every way to keep documents apart is the mask's: the same values and gradients, padding included.

Varlen's kernel is for CUDA only and flex attention has no backward pass on CPU. What is handed to them is held against the mask
here: the segments by a plain loop in the kernel's place, the block mask by flex attention itself, uncompiled.
"""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask

from mtp_dist.model import attention
from mtp_dist.model.attention import (
    SHORT_ON_CPU,
    Mask,
    Segments,
    attend,
    block_mask,
    build_mask,
    document_mask,
    document_starts,
    most_documents,
    segments,
    shared,
    whole_heads,
)
from tests.model.small import rows, small_model

EXACT = 1e-12
"""float64: the same sums in another order."""
FLEX = 1e-5
"""Flex attention computes scores in float32."""

DOCUMENTS = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 2, 3, 3, 3, 3],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [4, 4, 4, 5, 5, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, -1, -1, -1, -1],
    ],
    dtype=torch.int32,
)


def in_segments(documents: Tensor) -> Segments:
    mask = build_mask("varlen", documents, document_starts(documents, most_documents(documents)))
    assert isinstance(mask, Segments)
    return mask


def loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """``varlen_attn`` as its documentation reads: [T, H, c], one causal attention a segment."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q.equal(cu_seq_k)
    assert cu_seq_q.diff().ge(0).all()
    assert cu_seq_q.diff().max() <= max_q == max_k
    assert (cu_seq_q[0], cu_seq_q[-1]) == (0, query.shape[0])
    parts = []
    for begin, end in pairwise(cu_seq_q.tolist()):
        if end > begin:
            one = [x[begin:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
            parts.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(parts)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """4 query heads on 2 key/value heads of width 16."""
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(5, heads, 9, 16, dtype=dtype, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def with_gradients(mask: Mask) -> list[Tensor]:
    tensors = inputs()
    out = attend(*tensors, mask, causal=True)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


def test_segments_are_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", loop)
    for got, want in zip(with_gradients(in_segments(DOCUMENTS)), with_gradients(document_mask(DOCUMENTS)), strict=True):
        assert (got - want).abs().max() <= EXACT


def test_the_kernel_takes_what_it_is_given() -> None:
    """Torch's own, on the meta device: arguments, shapes and gradients fit, if nothing is computed."""
    tensors = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in inputs()]
    starts = document_starts(DOCUMENTS, 16).to("meta")
    out = attend(*tensors, segments(starts, 9), causal=True)
    assert out.shape == tensors[0].shape
    for gradient, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert gradient.shape == x.shape


@torch.no_grad()
@given(st.integers(1, 700), st.lists(st.integers(1, 699), max_size=6), st.sampled_from([16, 128]))
@settings(max_examples=60, deadline=None)
def test_blocks_are_those_that_torch_finds_pair_by_pair(length: int, cuts: list[int], block: int) -> None:
    """Which blocks hold some pair of a document, and which hold nothing else."""
    row = torch.zeros(length, dtype=torch.int32)
    for cut in cuts:
        row[cut:] += 1
    documents = torch.stack([row, torch.zeros_like(row), torch.arange(length, dtype=torch.int32)])

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    with patch.object(attention, "BLOCK", block):
        ours = block_mask(documents)
    theirs = create_block_mask(visible, 3, None, length, length, device="cpu", BLOCK_SIZE=block)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_indices"):
        assert getattr(ours, name).equal(getattr(theirs, name)), name
    assert ours.seq_lengths == theirs.seq_lengths


def test_the_block_mask_is_the_mask() -> None:
    tensors = [x.detach() for x in inputs(torch.float32)]
    want = attend(*tensors, document_mask(DOCUMENTS), causal=True)
    assert (attend(*tensors, block_mask(DOCUMENTS), causal=True) - want).abs().max() <= FLEX
    assert (attend(*tensors, None, causal=True) - want).abs().max() > 1e-2, "the mask makes no difference here: nothing is shown"


@pytest.mark.parametrize("length", [SHORT_ON_CPU, SHORT_ON_CPU + 1])
def test_short_rows_in_bfloat16_are_computed_in_float32(length: int) -> None:
    """Results and gradients of one rounding each; longer rows, and those that need no gradient, stay in bfloat16."""
    generator = torch.Generator().manual_seed(8)
    tensors = [torch.randn(1, h, length, 8, generator=generator).bfloat16().requires_grad_() for h in (4, 2, 2)]
    wide = [x.detach().float().requires_grad_() for x in tensors]
    mask = document_mask(torch.arange(length).unsqueeze(0) // 50)
    got, want = (attend(*inputs, mask, causal=True) for inputs in (tensors, wide))
    weights = torch.randn(want.shape, generator=generator).bfloat16()
    gradients = torch.autograd.grad((got * weights).sum(), tensors)
    rounded = torch.autograd.grad((want * weights).sum(), wide)
    same = [a.equal(b.bfloat16()) for a, b in zip((got, *gradients), (want, *rounded), strict=True)]
    assert same == [length <= SHORT_ON_CPU] * 4
    assert not attend(*(x.detach() for x in tensors), mask, causal=True).equal(want.bfloat16())


def test_no_mask_is_one_document() -> None:
    for got, want in zip(with_gradients(None), with_gradients(document_mask(torch.zeros(5, 9))), strict=True):
        assert (got - want).abs().max() <= EXACT


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("rows", [False, True], ids=["one mask", "a mask a row"])
def test_a_shared_mask_is_the_mask(heads: tuple[int, int], rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, count, length, 8, generator=generator, dtype=torch.float64)
        for count, length in ((heads[0], 4), (heads[1], 9), (heads[1], 9))
    )
    mask = torch.rand((2, 1, 4, 9) if rows else (4, 9), generator=generator) < 0.5
    mask[..., 0] = True
    ready = shared(mask, heads[0] // heads[1], torch.float64)
    found, want = (attend(query, key, value, each, causal=False) for each in (ready, mask))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_whole_heads_are_grouped_queries() -> None:
    query, key, value = inputs()
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    got = F.scaled_dot_product_attention(query, whole_heads(key, query), whole_heads(value, query), is_causal=True)
    assert (got - want).abs().max() <= EXACT


def test_where_documents_begin() -> None:
    starts = document_starts(DOCUMENTS, 16)
    assert starts[0].tolist() == [0] + [9] * 15
    assert starts[1].tolist() == [0, 1, 4, 5] + [9] * 12
    assert starts[3].tolist() == [0, 3, 5] + [9] * 13
    assert segments(starts[1:2], 9).bounds.tolist() == [0, 1, 4, 5] + [9] * 13


@given(st.lists(st.lists(st.integers(-1, 3), min_size=12, max_size=12), min_size=1, max_size=4))
@settings(deadline=None)
def test_any_runs_of_numbers_are_found(numbers: list[list[int]]) -> None:
    """As a plain walk over the flattened rows finds them, empty documents left out; the bound on their number holds."""
    documents = torch.tensor(numbers, dtype=torch.int32)
    bounds = [row * 12 + i for row, of in enumerate(numbers) for i in range(12) if i == 0 or of[i] != of[i - 1]]
    found, longest = in_segments(documents)
    assert longest == 12
    assert sorted(set(found.tolist())) == [*bounds, 12 * len(numbers)]
    assert found.tolist() == sorted(found.tolist())
    most = most_documents(documents)
    assert most >= max(sum(12 * row <= bound < 12 * row + 12 for bound in bounds) for row in range(len(numbers)))
    assert most in (8, 16)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_by_segments_is_the_masked_model(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    """Trunk and MTP modules, documents from 1 token to a whole row, padding."""
    monkeypatch.setattr(varlen, "varlen_attn", loop)

    def result(attention: str) -> list[Tensor]:
        model = small_model(2)
        model.attention, model.recompute = attention, recompute
        tokens, documents = rows(2)
        attending = documents[:, :6]
        starts = document_starts(attending, most_documents(attending)) if attention == "varlen" else None
        out = model(tokens=tokens, documents=documents, scale=torch.rand(3, 3), starts=starts)
        out[0].backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.manual_seed(0)
    want = result("masked")
    torch.manual_seed(0)
    for got, right in zip(result("varlen"), want, strict=True):
        # The loss is float32.
        assert (got - right).abs().max() <= 1e-6 * right.abs().max()


@pytest.mark.parametrize("attention", ["causal", "flex"])
def test_the_models_setting_chooses_the_mask(attention: str) -> None:
    """Evaluation by flex attention, uncompiled, is the masked one; causal attention is another model."""

    @torch.no_grad()
    def result(name: str) -> Tensor:
        model = small_model(2)
        model.attention = name
        tokens, documents = rows(2)
        return model(tokens=tokens, documents=documents, scale=torch.ones(3, 3))[0]

    same = bool((result(attention) - result("masked")).abs() <= 1e-4)
    assert same == (attention != "causal")
