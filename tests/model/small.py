"""Small models in double precision whose every weight matters: norms are not ones, nothing is near zero."""

import torch
from torch import Tensor

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize, spec_of

VOCABULARY = 13


def small_model(depth: int = 2, *, tie: bool = True, document_mask: bool = True, layers: int = 2, **mtp: object) -> Chunk:
    """float64, two layers of width 8; the heads together (4 x 4) are wider than the residual stream."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        layers=layers,
        hidden=8,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp=6,
        norm_eps=1e-3,
        rope_theta=100.0,
        tie_embeddings=tie,
        document_mask=document_mask,
        init_std=0.5,
    )
    heads = MTPConfig(**{"kind": "sequential" if depth else "none", "depth": depth} | mtp)  # type: ignore[arg-type]
    with torch.device("meta"):
        chunk = Chunk(model, heads, range(layers), draft_tokens=draft_tokens(heads))
    initialize(chunk, seed=3)
    chunk.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in chunk.parameters():
            if p.ndim == 1 or not p.any() or spec_of(p).copy_of:  # also what starts as zeros or as a copy
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return chunk


def draft_tokens(mtp: MTPConfig) -> list[int]:
    """As many as `mtp.draft_vocabulary` asks for, here and there: every other one, from the last but one down."""
    return [(VOCABULARY - 2 - 2 * place) % VOCABULARY for place in range(mtp.draft_vocabulary or 0)]


def rows(depth: int, positions: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens and documents [3, S+1+D]: one document; documents of 1, 4, 1 and many tokens; three tokens and padding behind."""
    width = positions + 1 + depth
    tokens = torch.randint(0, VOCABULARY, (3, width), generator=torch.Generator().manual_seed(11))
    documents = torch.zeros(3, width, dtype=torch.int32)
    documents[1, 1:], documents[1, 5:], documents[1, 6:] = 1, 2, 3
    documents[2, 3:] = -1
    return tokens, documents


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether no element is off by more than `tolerance` of the largest one."""
    return got.shape == want.shape and bool((got.double() - want).abs().max() <= tolerance * want.abs().max())
