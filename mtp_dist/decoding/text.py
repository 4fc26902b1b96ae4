"""The texts of a batch while they grow: known tokens, and behind them the drafts of the moment."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Texts:
    """tokens int64 [B, capacity]: row b's known tokens t[0] .. t[known[b]-1], those of ``rows``; what stands behind them is
    drafts or nothing.

    Whoever drafts writes behind the known tokens, where the trunk's verifying pass reads; ``extend`` makes tokens known.
    """

    def __init__(self, texts: Sequence[Sequence[int]], capacity: int, device: torch.device) -> None:
        self.rows = [list(text) for text in texts]
        self.known = [len(text) for text in texts]
        if max(self.known) > capacity:
            raise IndexError(f"{max(self.known)} tokens do not fit {capacity}")
        filled = [[*text, *[0] * (capacity - len(text))] for text in texts]
        self.tokens = torch.tensor(filled, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.known)

    @property
    def column(self) -> int | None:
        """Where the known tokens end, if that is the same in all rows: one slice is faster then than places row by row."""
        return self.known[0] if min(self.known) == max(self.known) else None

    def draft(self, place: int, tokens: Tensor) -> None:
        """Write int64 [B] as draft number ``place``, counted from 0, behind the known tokens of each row."""
        if (column := self.column) is not None:
            self.tokens[:, column + place] = tokens
            return
        columns = torch.tensor(self.known, device=self.tokens.device) + place
        self.tokens[torch.arange(len(self), device=self.tokens.device), columns] = tokens

    def branch(self, tokens: Tensor) -> None:
        """Write int64 [B, m] behind the known tokens of each row: the nodes of a tree."""
        columns = torch.tensor(self.known, device=self.tokens.device).unsqueeze(1)
        self.tokens.scatter_(1, columns + torch.arange(tokens.shape[1], device=self.tokens.device), tokens)

    def drafts(self, count: int) -> Tensor:
        """int64 [B, count]: what stands behind the known tokens."""
        if (column := self.column) is not None:
            return self.tokens[:, column : column + count].clone()
        columns = torch.tensor(self.known, device=self.tokens.device).unsqueeze(1)
        return self.tokens.gather(1, columns + torch.arange(count, device=self.tokens.device))

    def extend(self, new: Sequence[Sequence[int]]) -> None:
        """Row b is known to go on with the tokens new[b]."""
        values = torch.tensor([token for tokens in new for token in tokens], dtype=torch.int64, device=self.tokens.device)
        if len(self) == 1:
            self.tokens[0, self.known[0] : self.known[0] + len(values)] = values
        else:
            rows = [row for row, tokens in enumerate(new) for _ in tokens]
            columns = [self.known[row] + place for row, tokens in enumerate(new) for place in range(len(tokens))]
            self.tokens[rows, columns] = values
        self.known = [known + len(tokens) for known, tokens in zip(self.known, new, strict=True)]
        for row, tokens in zip(self.rows, new, strict=True):
            row.extend(tokens)

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        self.tokens = self.tokens[rows]
        self.rows = [self.rows[row] for row in rows]
        self.known = [self.known[row] for row in rows]

    def join(self, other: "Texts") -> None:
        """The rows of others of the same capacity go on behind these."""
        self.tokens = torch.cat((self.tokens, other.tokens))
        self.rows = self.rows + other.rows
        self.known = self.known + other.known


class Snapshot:
    """Known tokens and the drafts behind them, as they once were."""

    def __init__(self, texts: Texts, drafts: int) -> None:
        self.tokens, self.lengths = texts.tokens.clone(), [known + drafts for known in texts.known]

    def right(self, texts: Texts) -> list[int]:
        """How many tokens of each row, from the first on, turned out right so far."""
        return shared(self.tokens, texts.tokens, [min(ends) for ends in zip(self.lengths, texts.known, strict=True)])

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        self.tokens, self.lengths = self.tokens[rows], [self.lengths[row] for row in rows]


def shared(a: Tensor, b: Tensor, most: list[int]) -> list[int]:
    """Tokens [B, n] twice -> for each row, how many from the first on are equal, most[b] at most."""
    equal = (a == b).long().cumprod(1).sum(1).tolist()
    return [min(same, bound) for same, bound in zip(equal, most, strict=True)]
