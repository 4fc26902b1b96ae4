"""What the modes of decoding made of the same prompts: texts and numbers side by side, for people and as JSON. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.engine import Generated
from mtp_dist.decoding.statistics import Statistics, total


@dataclass(frozen=True)
class Continuation:
    """One prompt, its tokens, and what each mode ("plain", "speculative") made of it; ``texts`` hold no prompt."""

    prompt: str
    prompt_tokens: list[int]
    results: dict[str, Generated]
    texts: dict[str, str]

    @property
    def identical(self) -> bool | None:
        """Whether all modes gave the same tokens; None where only one ran."""
        tokens = [result.tokens for result in self.results.values()]
        return all(other == tokens[0] for other in tokens) if len(tokens) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        modes = {
            mode: {
                "text": self.texts[mode],
                "tokens": r.tokens,
                "drafts": r.drafts,
                "ending": r.ending,
                "statistics": r.statistics.as_dict(),
            }
            for mode, r in self.results.items()
        }
        return {"prompt": self.prompt, "prompt_tokens": self.prompt_tokens, **modes, "identical": self.identical}


def totals(items: Sequence[Continuation]) -> dict[str, Statistics]:
    """Each mode's statistics over all prompts."""
    return {mode: total(item.results[mode].statistics for item in items) for mode in items[0].results}


def speedup(columns: Mapping[str, Statistics]) -> float | None:
    """Tokens/s of speculative decoding over plain decoding's; None unless both were measured."""
    if set(columns) != {"plain", "speculative"}:
        return None
    plain, speculative = columns["plain"].tokens_per_second, columns["speculative"].tokens_per_second
    return speculative / plain if plain and speculative else None


def speedup_quartiles(items: Sequence[Continuation]) -> tuple[float, float] | None:
    """The first and third quartile of the prompts' own speedups; None with fewer than four that were measured."""
    found = sorted(ratio for item in items if (ratio := speedup(totals([item]))) is not None)
    if len(found) < 4:
        return None
    low, _, high = quantiles(found, n=4, method="inclusive")
    return low, high


def summary(items: Sequence[Continuation], decode: DecodeConfig) -> str:
    """The numbers of all prompts together: a table, the speedup, and whether greedy texts agree."""
    columns = totals(items)
    lines = [table(columns)]
    if "speculative" in columns:
        lines.append("accepted at depth k: share of the drafts of that depth (of those whose earlier drafts were all accepted)")
    if len(columns) > 1:
        spread = speedup_quartiles(items)
        middle = f" (half of the prompts: {spread[0]:.2f} to {spread[1]:.2f})" if spread else ""
        lines.append(f"speculative / plain tokens/s: {_shown(speedup(columns))}{middle}")
        if decode.temperature == 0:
            lines.append(_agreement(items, decode))
    return "\n".join(lines)


def table(columns: Mapping[str, Statistics]) -> str:
    """One column for each mode, one row for each number."""
    values = columns.values()
    rows = [
        ("", *columns),
        ("tokens", *(str(s.tokens) for s in values)),
        ("forwards after the prompt", *(str(s.forwards) for s in values)),
        ("tokens per forward", *(_shown(s.tokens_per_forward) for s in values)),
        ("tokens/s after the prompt", *(_shown(s.tokens_per_second, 1) for s in values)),
    ]
    deepest = max(len(s.drafted) for s in values)
    rows += [(f"accepted at depth {k + 1}", *(_acceptance(s, k) for s in values)) for k in range(deepest)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _acceptance(statistics: Statistics, k: int) -> str:
    if k >= len(statistics.drafted):
        return "-"
    return f"{_shown(statistics.acceptance[k])} ({_shown(statistics.conditional_acceptance[k])})"


def _agreement(items: Sequence[Continuation], decode: DecodeConfig) -> str:
    same = sum(bool(item.identical) for item in items)
    if same == len(items):
        return "greedy texts identical: yes"
    # One token and several in a pass run different kernels, which may round a near tie differently.
    reason = "" if decode.dtype == "float64" else f"; near ties fall either way in {decode.dtype}, decode.dtype=float64 tells"
    return f"greedy texts identical: no, {same} of {len(items)}{reason}"


def _shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
