"""The tokens among which the depths draft, where that is a part of the vocabulary (`mtp.draft_vocabulary`), and this tensor
rank's share of them. Buffers: whoever saves the heads keeps the list beside them (``checkpoint/draft_tokens.py``)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp_dist.model.parameter import ParameterSpec
from mtp_dist.model.tensor_group import TensorGroup


class DraftTokens(nn.Module):
    """`tokens` int64 [n], ascending: all of them; `rows` int64: those of this rank as rows of its slice of the output matrix, row
    0 alone where it has none (`empty`); `places` int64: the entry of `rows` of each row of the slice, -1 for none; `known` bool
    [V]: whether a token is one of all."""

    tokens: Tensor
    rows: Tensor
    places: Tensor
    known: Tensor

    def __init__(self, tokens: Sequence[int], vocabulary: int, group: TensorGroup) -> None:
        """Buffers are real whatever the default device is; ``to`` moves them with the weights."""
        super().__init__()
        whole = torch.tensor(sorted(tokens), dtype=torch.int64, device="cpu")
        here = ParameterSpec((vocabulary,), split=0, std=None, group=group)
        (begin,), (size,) = here.start, here.local_shape
        own = whole[(whole >= begin) & (whole < begin + size)] - begin
        self.empty = not len(own)
        known = torch.zeros(vocabulary, dtype=torch.bool, device="cpu")
        known[whole] = True
        places = torch.full((size,), -1, dtype=torch.int64, device="cpu")
        places[own] = torch.arange(len(own), device="cpu")
        rows = torch.zeros(1, dtype=torch.int64, device="cpu") if self.empty else own
        for name, value in (("tokens", whole), ("rows", rows), ("places", places), ("known", known)):
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.tokens)
