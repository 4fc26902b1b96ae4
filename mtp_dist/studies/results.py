"""The outcomes of an experiment as a table for people (Markdown) and for programs (JSON)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_dist.config.schema import Study
from mtp_dist.studies.experiment import Column, Experiment, Outcome
from mtp_dist.studies.intervals import Interval, difference, interval


@dataclass(frozen=True)
class Results:
    """`outcomes`: variant -> one for each of `config.seeds`, in this order."""

    config: Study
    outcomes: dict[str, list[Outcome]]

    def values(self, variant: str, key: str) -> list[float]:
        """One value a seed; empty where the variant has no such number."""
        return [outcome.numbers[key] for outcome in self.outcomes[variant] if key in outcome.numbers]

    def mean(self, variant: str, key: str) -> Interval | None:
        values = self.values(variant, key)
        return interval(values) if values else None

    def difference(self, variant: str, key: str) -> Interval | None:
        """From the first variant, paired by seed."""
        values, base = self.values(variant, key), self.values(next(iter(self.outcomes)), key)
        return difference(values, base) if values and len(values) == len(base) else None

    def keys(self, columns: Sequence[Column]) -> list[Column]:
        """The columns that some variant has values for."""
        return [column for column in columns if any(self.values(variant, column.key) for variant in self.outcomes)]


def markdown(experiment: Experiment, results: Results, command: str) -> str:
    """The whole page."""
    config = results.config
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    lines = [f"# {config.experiment}, size={config.size}", "", experiment.question, "", f"`{command}`", ""]
    lines += [f"Mean over {seeds} ± half of the 95 % interval (Student's t)."]
    lines += ["", *_table(experiment.columns, results)]
    compared = [column for column in results.keys(experiment.columns) if column.compared]
    if compared and len(results.outcomes) > 1:
        lines += ["", *_differences(compared, results)]
    notes = experiment.notes(config)
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, "", f"![{config.experiment}]({config.experiment}.png)"]) + "\n"


def _table(columns: Sequence[Column], results: Results) -> list[str]:
    shown = results.keys(columns)
    lines = ["| variant | " + " | ".join(column.title for column in shown) + " |", "|---|" + "---|" * len(shown)]
    for variant in results.outcomes:
        means = [(results.mean(variant, column.key), column.digits) for column in shown]
        lines.append(f"| {variant} | " + " | ".join("" if mean is None else mean.text(digits) for mean, digits in means) + " |")
    return lines


def _differences(columns: Sequence[Column], results: Results) -> list[str]:
    base, *others = results.outcomes
    lines = [f"Differences from `{base}`, seed by seed; where the interval holds 0 the size or the seeds do not resolve it:", ""]
    lines += ["| variant | " + " | ".join(column.title for column in columns) + " |", "|---|" + "---|" * len(columns)]
    for variant in others:
        cells = []
        for column in columns:
            found = results.difference(variant, column.key)
            cells.append("" if found is None else found.text(column.digits, sign=True) + _verdict(found))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return lines


def _verdict(found: Interval) -> str:
    if found.half is None or found.resolved:
        return ""
    return ", equal" if found.mean == found.half == 0 else ", not resolved at this size"


def as_json(results: Results, command: str) -> dict[str, Any]:
    """Every number of every seed; one that is not finite is None, as JSON has no word for it."""
    return {
        "experiment": results.config.experiment,
        "size": results.config.size,
        "command": command,
        "seeds": results.config.seeds,
        "variants": {
            name: [
                {"numbers": {key: value if math.isfinite(value) else None for key, value in outcome.numbers.items()}}
                for outcome in outcomes
            ]
            for name, outcomes in results.outcomes.items()
        },
    }
