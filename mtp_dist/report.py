"""Plots and a table of one run, from its metrics.jsonl: ``python -m mtp_dist.report run_dir=runs/quickstart``.

Works while the run goes on and on a machine without torch. Writes ``<output>/{loss,accuracy,optimizer,speed}.png`` (those that
the run has values for) and ``report.md``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from mtp_dist.config.command import application
from mtp_dist.config.schema import Report
from mtp_dist.errors import UserError
from mtp_dist.quantity import counted
from mtp_dist.standard_streams import say
from mtp_dist.tracking import names
from mtp_dist.tracking.jsonl import METRICS_FILE, read_records
from mtp_dist.tracking.phases import phase_seconds
from mtp_dist.tracking.plots import DRAWINGS, Series
from mtp_dist.tracking.starts import read_starts
from mtp_dist.training.status import STOPPED, current


def write_report(run_dir: Path, output: Path | None = None) -> list[Path]:
    """Write plots and report.md into ``output`` (None: ``run_dir/report``); returns the files. UserError without metrics."""
    path = run_dir / METRICS_FILE
    if not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is not a folder; give the run_dir of a training run")
    records = read_records(path)
    if not records:
        raise UserError(f"run_dir={run_dir} holds no metrics ({METRICS_FILE} is missing or empty); train there first")
    say(f"drawing {len(records)} records of {path}")
    folder = output or run_dir / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        starts = read_starts(run_dir)
        plots = _write_plots(Series(records, [start["step"] for start in starts[1:]], _stopped_at(run_dir)), folder)
        page = folder / "report.md"
        page.write_text(page_text(run_dir.resolve().name, records, plots, starts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror}); choose another folder") from None
    return [*plots, page]


def _stopped_at(run_dir: Path) -> int | None:
    """The step at which the run rests, where it was asked to stop before its end."""
    found = current(run_dir)
    return found.step if found is not None and found.state == STOPPED else None


def _write_plots(series: Series, folder: Path) -> list[Path]:
    written = []
    for name, draw in DRAWINGS.items():
        figure = draw(series)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            plt.close(figure)
            written.append(path)
    return written


def last_values(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Metric -> (last value, its step), in the order of ``names.MEANING``, unknown metrics last."""
    found = {name: (value, record["step"]) for record in records for name, value in record.items() if name != "step"}
    order = list(names.MEANING)
    return dict(sorted(found.items(), key=lambda item: (_rank(item[0], order), item[0])))


def _rank(name: str, order: Sequence[str]) -> int:
    known = _documented(name)
    return order.index(known) if known is not None else len(order)


def _documented(name: str) -> str | None:
    """The entry of ``names.MEANING`` that a metric belongs to: itself, or its prefix before the depth."""
    if name in names.MEANING:
        return name
    prefix = name.rstrip("0123456789")
    return prefix if prefix in names.MEANING and prefix != name else None


def page_text(
    title: str, records: Sequence[dict[str, Any]], plots: Sequence[Path], starts: Sequence[dict[str, Any]] = ()
) -> str:
    """report.md: one table of last values, where the time went, the starts, then the plots."""
    lines = [f"# {title}", "", f"Steps {records[0]['step']} to {records[-1]['step']}, {counted(len(records), 'record')}.", ""]
    lines += ["| Metric | Last value | At step | Meaning |", "|---|---:|---:|---|"]
    for name, (value, step) in last_values(records).items():
        known = _documented(name)
        lines.append(f"| `{name}` | {value:,.6g} | {step} | {names.MEANING[known] if known else ''} |")
    if found := phase_seconds(records):
        lines += ["", "## Where the time went", "", "| Phase | Seconds | Share |", "|---|---:|---:|"]
        whole = sum(found.values()) or 1.0
        lines += [f"| {phase} | {seconds:,.1f} | {seconds / whole:.1%} |" for phase, seconds in found.items()]
    if len(starts) > 1:
        lines += ["", "## Starts", "", "| Start | After step | Time (UTC) |", "|---:|---:|---|"]
        lines += [f"| {n} | {start['step']} | {start['time']} |" for n, start in enumerate(starts, start=1)]
    if plots:
        lines += ["", "## Plots", "", "Pale lines are single steps, strong ones their running mean."]
    lines += [line for plot in plots for line in ("", f"![{plot.stem}]({plot.name})")]
    return "\n".join(lines) + "\n"


def run(config: Report) -> int:
    if not config.run_dir:
        raise UserError("run_dir is empty; give the folder of a run: run_dir=runs/quickstart")
    for path in write_report(Path(config.run_dir), Path(config.output) if config.output else None):
        print(path)
    return 0


if __name__ == "__main__":
    application("report", Report, run, paths=("run_dir",), examples=["python -m mtp_dist.report runs/quickstart"])
