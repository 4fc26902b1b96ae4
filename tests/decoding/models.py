"""Tiny models for the decoding tests: random ones, and one taught a pattern so that its drafts are often right."""

from collections.abc import Sequence

import torch

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from mtp_dist.model.targets import targets

VOCABULARY = 23


def random_model(
    depth: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    vocabulary: int = VOCABULARY,
    tie: bool = True,
    document_mask: bool = True,
    std: float = 0.3,
    layers: int = 2,
    kind: str = "sequential",
    draft_tokens: Sequence[int] | None = None,
    **mtp: object,
) -> Chunk:
    """Two layers of width 32. The large initial values make texts that do not repeat themselves at once; heads that would start
    as copies of the main one get random values, too."""
    if draft_tokens is not None:
        mtp["draft_vocabulary"] = len(draft_tokens)
    model = ModelConfig(
        vocab_size=vocabulary,
        layers=layers,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=48,
        init_std=std,
        tie_embeddings=tie,
        document_mask=document_mask,
    )
    heads = MTPConfig(kind=kind if depth else "none", depth=depth, **mtp)  # type: ignore[arg-type]
    with torch.device("meta"):
        chunk = Chunk(model, heads, range(layers), draft_tokens=draft_tokens)
    initialize(chunk, seed)
    if kind == "medusa":
        assert chunk.mtp is not None
        generator = torch.Generator().manual_seed(seed)
        for p in chunk.mtp.parameters():
            p.data.normal_(0, std, generator=generator)
    return chunk.to(dtype).eval()


def taught(chunk: Chunk, text: list[int], *, steps: int, length: int = 24) -> Chunk:
    """The chunk after ``steps`` steps of AdamW on windows of the endlessly repeated text."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(chunk.parameters(), lr=3e-3, weight_decay=0.0)
    row = torch.tensor(text * (2 + (2 * length) // len(text)))
    chunk.train()
    for _ in range(steps):
        starts = torch.randint(len(text), (4,), generator=generator).tolist()
        tokens = torch.stack([row[s : s + length + 1 + chunk.depth] for s in starts])
        documents = torch.zeros_like(tokens)
        scale = torch.full((len(starts), 1 + chunk.depth), 1 / targets(tokens, documents, chunk.depth)[..., 0].numel())
        optimizer.zero_grad()
        chunk(tokens=tokens, documents=documents, scale=scale)[0].backward()
        optimizer.step()
    return chunk.eval()
