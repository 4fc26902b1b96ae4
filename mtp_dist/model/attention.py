"""Attention kernels behind one function. What a position may attend to says which one runs.

A ``Mask`` is built once a forward pass (``build_mask``) and handed to every block. All of them mean the same: position i attends
to j <= i of its own document, where documents are runs of equal numbers in a row (padding, -1, is one more).

- None: causal, no documents. torch's SDPA: flash kernels on CUDA for bfloat16, its own fused kernel on CPU.
- Tensor, bool: SDPA with a mask. Flash kernels on CUDA take none, so the memory-efficient one runs there.
- ``Shared``: a mask for few positions on CPU, made ready for all layers of a decoding pass.
- ``Segments``: torch's varlen attention (CUDA, half precision): one flash kernel over documents that lie end to end.
- ``BlockMask``: torch's flex attention, compiled: blocks of scores that no pair of a document meets are left out.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HALF = (torch.bfloat16, torch.float16)
SHORT_ON_CPU = 256
"""Positions up to which training in bfloat16 on CPU computes attention in float32: torch's bfloat16 backward pass is slow on
short rows. Forward and backward took 0.4 of the time at 128 positions and 0.8 at 256, but 1.4 at 512."""
FEW = 64
"""Positions up to which a mask is ``Shared``; one position gains nothing."""
BLOCK = 128
"""Positions of a block of flex attention, torch's default."""


class Segments(NamedTuple):
    """bounds int32 [n+1]: where each document of the flattened rows [B S] begins, and the end; documents may be empty.
    longest: at least the positions of any."""

    bounds: Tensor
    longest: int


class Shared(NamedTuple):
    """added [.., G n, total]: 0 where a query may look, -inf elsewhere, for the n positions of each of the G query heads that
    share a key head. Attention then is one product a key head instead of one a query head, and nothing is converted layer by
    layer: at 8 rows of 4 positions it took half the time."""

    added: Tensor


Mask = Tensor | Shared | Segments | BlockMask | None


def build_mask(backend: str, documents: Tensor, starts: Tensor | None) -> Mask:
    """documents int [B, S]; starts: ``document_starts``, for varlen."""
    if backend == "masked":
        return document_mask(documents)
    if backend == "varlen":
        assert starts is not None
        return segments(starts, documents.shape[1])
    if backend == "flex":
        return block_mask(documents)
    return None


def document_mask(documents: Tensor) -> Tensor:
    """documents int [B, S] -> bool [B, 1, S, S]: True where position i may attend to j: j <= i in the same document."""
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def shared(mask: Tensor, heads: int, dtype: torch.dtype) -> Shared:
    """A bool mask [.., n, total] for `heads` query heads a key head, of that dtype."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return Shared(added.repeat(*[1] * (mask.dim() - 2), heads, 1))


def block_mask(documents: Tensor) -> BlockMask:
    """The same for flex attention: documents int [B, S], each one run of equal numbers.

    Runs follow one another, so the first and last position of a block tell all about it, and nothing of S x S is built (torch's
    own builder evaluates every pair). Built without waiting for the device.
    """
    length = documents.shape[1]
    run = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(1, dtype=torch.int32)  # [B, S], ascending

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (run[row, query] == run[row, key])

    begins = torch.arange(0, length, BLOCK, device=documents.device)
    first, last = run[:, begins], run[:, (begins + BLOCK - 1).clamp(max=length - 1)]  # [B, blocks]
    blocks = torch.arange(len(begins), device=documents.device)
    before = blocks.unsqueeze(1) > blocks  # [query block, key block]
    touched = before & (last.unsqueeze(1) >= first.unsqueeze(2)) | (blocks.unsqueeze(1) == blocks)
    # All pairs of a document: a last block that ends early is never so.
    full = before & (first.unsqueeze(1) == last.unsqueeze(2)) & (begins + BLOCK <= length).unsqueeze(1)
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, query blocks, key blocks] -> how many key blocks, int32 [B, 1, query blocks], and which, those first."""
    which = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), which.unsqueeze(1)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def most_documents(documents: Tensor) -> int:
    """documents int [.., S] -> at least the documents of any row: a power of two, 8 or more, so that few shapes occur. Waits for
    the device, so it is asked once a step, before the first forward pass, when the device has nothing else to do."""
    most = int((documents[..., 1:] != documents[..., :-1]).sum(-1).max()) + 1
    return max(8, 1 << (most - 1).bit_length())


def document_starts(documents: Tensor, most: int) -> Tensor:
    """documents int [B, S] -> int32 [B, most]: where the documents of each row begin, ascending; S where there are no more."""
    rows, length = documents.shape
    positions = torch.arange(length, dtype=torch.int32, device=documents.device).expand(rows, -1)
    new = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = positions.masked_fill(~new, length).sort(dim=1).values[:, :most]
    return F.pad(starts, (0, most - starts.shape[1]), value=length)


def segments(starts: Tensor, length: int) -> Segments:
    """starts [B, most] of rows of ``length`` positions -> the documents of all rows end to end. A start at a row's end is an
    empty document before the next row."""
    rows = starts.shape[0]
    begins = torch.arange(0, rows * length, length, dtype=torch.int32, device=starts.device)
    return Segments(F.pad((starts + begins.unsqueeze(1)).flatten(), (0, 1), value=rows * length), length)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, causal: bool) -> Tensor:
    """query [B, H, n, c], key and value [B, K, total, c] -> [B, H, n, c]. `causal`: what a mask of None means; False: all is
    visible."""
    if isinstance(mask, Segments):
        return _varlen(query, key, value, mask)
    if isinstance(mask, BlockMask):
        return _flex(query, key, value, mask)
    if isinstance(mask, Shared):
        together = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        return F.scaled_dot_product_attention(together, key, value, attn_mask=mask.added).view(query.shape)
    if query.is_cuda and (mask is not None or query.dtype not in HALF):
        # Of the fused kernels only flash takes fewer key heads, and it takes neither a mask nor float32: without whole heads
        # torch would compute all scores.
        key, value = whole_heads(key, query), whole_heads(value, query)
    dtype = query.dtype
    if query.requires_grad and not query.is_cuda and dtype in HALF and query.shape[2] <= SHORT_ON_CPU:
        query, key, value = query.float(), key.float(), value.float()
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=key.shape[1] != query.shape[1]
    )
    return attended.to(dtype)


def whole_heads(x: Tensor, query: Tensor) -> Tensor:
    """[B, K, n, c] -> [B, H, n, c]: each head as often as queries share it."""
    return x.unsqueeze(2).expand(-1, -1, query.shape[1] // x.shape[1], -1, -1).flatten(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, mask: Segments) -> Tensor:
    # It takes a second to load, and runs on CUDA only.
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 there is no such argument, and no need for it where each query head has a key head.
    grouped: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    attended = varlen_attn(
        _end_to_end(query),
        _end_to_end(key),
        _end_to_end(value),
        cu_seq_q=mask.bounds,
        cu_seq_k=mask.bounds,
        max_q=mask.longest,
        max_k=mask.longest,
        window_size=(-1, 0),  # as far back as there is, no further than itself
        **grouped,
    )
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (query.shape[0], -1)).transpose(1, 2)


def _end_to_end(x: Tensor) -> Tensor:
    """[B, H, S, c] -> [B S, H, c]"""
    return x.transpose(1, 2).flatten(0, 1)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    # Uncompiled it computes all scores; within a compiled block it is compiled with it.
    inside = torch.compiler.is_compiling() or not query.is_cuda
    kernel = flex_attention if inside else _compiled_flex()
    return kernel(query, key, value, block_mask=mask, enable_gqa=key.shape[1] != query.shape[1])


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)
