"""Text on a terminal in which drafts that were accepted have a colour: what speculative decoding did not have to pay for."""

import os
from collections.abc import Sequence
from typing import TextIO

from mtp_dist.decoding.stopping import TextStream

DRAFT, END = "\x1b[32m", "\x1b[39m"  # green, and the terminal's own colour
LEGEND = f"{DRAFT}green{END}: drafts that the trunk accepted"


def wants_color(setting: str, output: TextIO) -> bool:
    """``setting``: always | never | auto (on a terminal, unless NO_COLOR is set; see https://no-color.org)."""
    if setting == "auto":
        return output.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return setting == "always"


def marked(stream: TextStream, tokens: Sequence[int], drafts: Sequence[bool]) -> str:
    """What a stream shows once these tokens have come. A piece has the colour of the token that completed it."""
    pieces = []
    for token, draft in zip(tokens, drafts, strict=True):
        piece = stream.feed([token])
        pieces.append(f"{DRAFT}{piece}{END}" if draft and piece else piece)
    return "".join(pieces).replace(f"{END}{DRAFT}", "")
