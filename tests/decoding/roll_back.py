"""An independent drafter whose texts accept now more, now fewer of its drafts: each draft must be that of a fresh one."""

from collections.abc import Callable, Sequence

import torch

from mtp_dist.decoding.drafter import Drafter
from mtp_dist.decoding.model import TrunkPass
from mtp_dist.decoding.text import Texts

PATTERNS = [[0, 0, 0], [0, 3, 1], [2, 0, 3], [0, 1, 0], [3, 3, 0], [0, 0, 0]]
"""Drafts that each of three texts accepts, round by round. After the third round the second text leaves; in the fourth another
one joins, and comes last."""


def check_roll_back(
    start: Callable[[Sequence[list[int]]], tuple[Texts, Drafter]],
    prompts: Sequence[list[int]],
    token: Callable[[int], int],
    before_last: Callable[[], object] = lambda: None,
) -> None:
    """``start``: texts, and a drafter that has seen them. ``token``: what follows the accepted drafts of a round."""
    unused = TrunkPass(torch.empty(0), torch.empty(0), {})
    texts, drafter = start(prompts)
    drafts: list[list[int]] = [[], [], []]
    for number, accepted in enumerate(PATTERNS):
        if number == len(PATTERNS) - 1:
            before_last()
        texts.extend([[*row[:count], token(number)] for row, count in zip(drafts, accepted, strict=False)])
        drafter.observe(texts, unused)
        if number == 3:
            more, other = start([prompts[2][:-1]])
            more.extend([prompts[2][-1:]])
            texts.join(more)
            drafter.join(other)
        drafts = drafter.propose(texts, 3).tokens.tolist()
        for row, found in zip(texts.rows, drafts, strict=True):
            alone, fresh = start([row[:-1]])
            alone.extend([row[-1:]])
            assert fresh.propose(alone, 3).tokens.tolist() == [found]
        if number == 2:
            texts.keep([0, 2])
            drafter.keep([0, 2])
            drafts = [drafts[0], drafts[2]]
    assert len(texts) == 3
