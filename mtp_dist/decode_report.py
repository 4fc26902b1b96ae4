"""How speculative decoding does on prompts of one's own: ``python -m mtp_dist.evaluate task=decode file=prompts.jsonl``.

Every prompt is decoded plainly and speculatively. Acceptance and the measured costs of a pass and of a draft make an expected
speedup; the clock gives the true one. The folder `output` gets report.json, report.md and report.png.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_dist.checkpoint import folder
from mtp_dist.config import versions
from mtp_dist.config.rules import given
from mtp_dist.config.schema import Evaluation, Generation
from mtp_dist.decoding import request
from mtp_dist.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.decoding.comparison import Continuation
    from mtp_dist.decoding.costs import Costs

NAMES = ("report.json", "report.md", "report.png")


def run(config: Evaluation) -> int:
    """The command. Raises UserError before any weight is read where the settings or the prompts do not fit."""
    asked, prompts, place = prepare(config)

    from mtp_dist.data.tokenizer import vocabulary_size
    from mtp_dist.decoding.costs import measure
    from mtp_dist.decoding.drafters import draft_length
    from mtp_dist.generate import open_writer

    checkpoint, writer, encoded = open_writer(asked, prompts)
    size, decode = asked.decode.batch, asked.decode
    writer.warm_up(encoded[:size])
    items = [
        item
        for first in range(0, len(prompts), size)
        for item in writer.write(prompts[first : first + size], encoded[first : first + size], first, None)
    ]
    drafts = draft_length(replace(decode, mode="speculative"), writer.model.depth)
    costs = measure(
        writer.model,
        encoded[:size],
        decode,
        drafts,
        vocabulary=vocabulary_size(writer.tokenizer),
        draft_model=writer.draft_model,
    )
    origin = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "file": config.file, "seed": config.seed}
    result = origin | {"decode": asdict(decode)} | report(items, costs, drafts)
    _write(place, result)
    print(markdown(result), end="")
    print(f"written to {place}", flush=True)
    return 0


def prepare(config: Evaluation) -> tuple[Generation, list[str], Path]:
    """What ``generate`` would be asked, the prompts, and the folder of the report. Raises UserError."""
    versions.check()
    given("file", config.file, "PROMPTS.jsonl (a JSON string a line)")
    asked = Generation(checkpoint=config.checkpoint, prompt_file=config.file, seed=config.seed)
    asked.decode = replace(config.decode, mode="both")
    request.validate(asked)
    prompts = request.read_prompts(asked)
    checkpoint = folder.sound(config.checkpoint)
    if config.output:
        place = Path(config.output)
        if place.exists() and not place.is_dir():
            raise UserError(f"output={place} is a file; with task=decode it names a folder for {', '.join(NAMES)}")
    elif checkpoint.parent.name == "checkpoints":
        place = checkpoint.parents[1] / "evaluation" / f"{checkpoint.name}.decode"
    else:
        raise UserError(f"checkpoint={config.checkpoint} is not in a run folder, so the report needs a place: output=FOLDER")
    return asked, prompts, place


def report(items: "Sequence[Continuation]", costs: "Costs", drafts: int) -> dict[str, Any]:
    """The numbers of all prompts together, ready for JSON. ``drafts``: γ of a round (the most, where it is chosen anew)."""
    from mtp_dist.decoding.comparison import speedup, totals

    columns = totals(items)
    forwards = columns["speculative"].tokens_per_forward
    return {
        "prompts": len(items),
        "gamma": drafts,
        "plain": columns["plain"].as_dict(),
        "speculative": columns["speculative"].as_dict(),
        "identical": sum(bool(item.identical) for item in items),
        "verify_cost": costs.curve,
        "verify_seconds": costs.verify,
        "draft_cost": costs.draft_cost,
        "expected_speedup": None if forwards is None else costs.speedup(forwards, drafts),
        "measured_speedup": speedup(columns),
    }


def markdown(result: dict[str, Any]) -> str:
    """The report for people."""
    decode, plain, fast = result["decode"], result["plain"], result["speculative"]
    how = "greedy" if decode["temperature"] == 0 else f"temperature {decode['temperature']:g}"
    how += ", typical acceptance (lossy)" if decode["verify"] == "typical" else ""
    chosen = f"0 to {result['gamma']}, chosen each round" if decode["auto"] else str(result["gamma"])
    lines = [
        f"# Decoding with drafts: step {result['step']}",
        "",
        f"{result['prompts']} prompts of {result['file']}, {how}, {decode['dtype']}, {decode['batch']} at a time; drafts by "
        f"{decode['drafter']}, γ = {chosen}.",
        "",
        "| | plain | speculative |",
        "|---|---|---|",
        f"| tokens | {plain['tokens']} | {fast['tokens']} |",
        f"| tokens a forward | {_shown(plain['tokens_per_forward'])} | {_shown(fast['tokens_per_forward'])} |",
        f"| tokens/s after the prompt | {_shown(plain['tokens_per_second'], 1)} | {_shown(fast['tokens_per_second'], 1)} |",
        "",
        f"Speedup: {_shown(result['measured_speedup'])} measured, {_shown(result['expected_speedup'])} expected of "
        "E / (v(γ+1) + γ c)" + (" at the largest γ" if decode["auto"] else "") + ".",
    ]
    if decode["temperature"] == 0:
        lines.append(f"Texts identical to plain greedy decoding: {result['identical']} of {result['prompts']}.")
    lines += ["", "| depth | accepted | of those reached | v(depth + 1) |", "|---|---|---|---|"]
    for k, (share, conditional) in enumerate(zip(fast["acceptance"], fast["conditional_acceptance"], strict=True)):
        lines.append(f"| {k + 1} | {_shown(share)} | {_shown(conditional)} | {_shown(result['verify_cost'][k + 1])} |")
    lines += ["", f"One draft costs c = {_shown(result['draft_cost'])} of a pass over one token.", ""]
    lines += ["| tokens of a forward | forwards |", "|---|---|"]
    lines += [f"| {n} | {times} |" for n, times in enumerate(fast["histogram"]) if n]
    return "\n".join(lines) + "\n"


def _write(place: Path, result: dict[str, Any]) -> None:
    from mtp_dist.tracking.decode_plot import draw

    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / NAMES[0]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (place / NAMES[1]).write_text(markdown(result), encoding="utf-8")
        draw(result).savefig(place / NAMES[2], dpi=120)
    except OSError as error:
        raise UserError(f"output={place} cannot be written: {error.strerror}") from None


def _shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
