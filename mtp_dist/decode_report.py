"""How speculative decoding does on prompts of one's own: ``python -m mtp_dist.evaluate task=decode file=prompts.jsonl``.

Every prompt is decoded plainly and speculatively, each file of prompts at each temperature. Acceptance and the measured costs of
a pass and of a draft make an expected speedup; the clock gives the true one. The folder `output` gets report.json, report.md and
report.png.
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
from mtp_dist.quantity import counted

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.decoding.comparison import Continuation
    from mtp_dist.decoding.costs import Costs
    from mtp_dist.generate import Writer

NAMES = ("report.json", "report.md", "report.png")
CACHE_ROWS = {
    "trunk_written": "KV cache bytes a token: trunk, written",
    "trunk_read": "trunk, read",
    "drafter_written": "drafter, written",
    "drafter_read": "drafter, read",
    "all": "all of these",
}
"""Titles of ``Statistics.cache_bytes_per_token`` in the report."""


def run(config: Evaluation) -> int:
    """The command. Raises UserError before any weight is read where the settings or the prompts do not fit."""
    asked, sets, place = prepare(config)

    from mtp_dist.generate import open_writer

    checkpoint, writer, encoded = open_writer(asked, [prompt for prompts in sets.values() for prompt in prompts])
    parts = []
    for file, prompts in sets.items():
        tokens, encoded = encoded[: len(prompts)], encoded[len(prompts) :]
        for temperature in config.temperatures or [asked.decode.temperature]:
            decode = replace(writer.decode, temperature=temperature)
            parts.append({"file": file, "temperature": temperature, **_part(replace(writer, decode=decode), prompts, tokens)})
    origin = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "seed": config.seed}
    result = origin | {"decode": asdict(asked.decode), "parts": parts}
    _write(place, result)
    print(markdown(result), end="")
    print(f"written to {place}", flush=True)
    return 0


def _part(writer: "Writer", prompts: list[str], tokens: list[list[int]]) -> dict[str, Any]:
    """One set of prompts at one temperature."""
    from mtp_dist.data.tokenizer import vocabulary_size
    from mtp_dist.decoding.costs import measure
    from mtp_dist.decoding.draft_lengths import DraftLengths
    from mtp_dist.decoding.drafters import draft_length, most_nodes
    from mtp_dist.generate import numbered

    decode, size = writer.decode, writer.decode.batch
    drafts = draft_length(decode, writer.model.depth)
    # What was learnt of another set does not hold here.
    writer = replace(writer, lengths=DraftLengths(drafts) if decode.auto else None)
    writer.warm_up(tokens[:size])
    items = list(writer.write(numbered(prompts, tokens)))
    vocabulary = vocabulary_size(writer.tokenizer)
    costs = measure(writer.model, tokens[:size], decode, drafts, vocabulary=vocabulary, draft_model=writer.draft_model)
    return report(items, costs, drafts, most_nodes(decode, writer.model.depth))


def prepare(config: Evaluation) -> tuple[Generation, dict[str, list[str]], Path]:
    """What ``generate`` would be asked, the prompts of each file, and the folder of the report. Raises UserError."""
    versions.check()
    if config.file and config.files:
        raise UserError(f"file={config.file} and files={config.files} both name prompts; choose one of them")
    if not config.files:
        given("file", config.file, "PROMPTS.jsonl (a JSON string a line)")
    if config.decode.mode == "plain":
        raise UserError("decode.mode=plain has no effect with task=decode, which compares plain and speculative; leave it out")
    temperatures = config.temperatures or [config.decode.temperature]
    files = list(dict.fromkeys(config.files)) or [config.file]
    sets = {}
    for file in files:
        asked = Generation(checkpoint=config.checkpoint, prompt_file=file, seed=config.seed, launch=config.launch)
        for temperature in sorted(temperatures, reverse=True):
            asked.decode = replace(config.decode, mode="both", temperature=temperature)
            if temperature == 0 and any(temperatures):  # top_k and top_p are for the others
                asked.decode = replace(asked.decode, top_k=0, top_p=1.0)
            request.validate(asked)
        sets[file] = request.read_prompts(asked)
    asked.decode = replace(config.decode, mode="both")
    checkpoint = folder.sound(config.checkpoint)
    if config.output:
        place = Path(config.output)
        if place.exists() and not place.is_dir():
            raise UserError(f"output={place} is a file; with task=decode it names a folder for {', '.join(NAMES)}")
    elif checkpoint.parent.name == "checkpoints":
        place = checkpoint.parents[1] / "evaluation" / f"{checkpoint.name}.decode"
    else:
        raise UserError(f"checkpoint={config.checkpoint} is not in a run folder, so the report needs a place: output=FOLDER")
    return asked, sets, place


def report(items: "Sequence[Continuation]", costs: "Costs", drafts: int, nodes: int) -> dict[str, Any]:
    """The numbers of all prompts together, ready for JSON. ``drafts``: γ of a round (the most, where it is chosen anew), or the
    depth of its tree; ``nodes``: drafts verified in a forward."""
    from mtp_dist.decoding.comparison import speedup, speedup_quartiles, totals

    columns = totals(items)
    forwards = columns["speculative"].tokens_per_forward
    return {
        "prompts": len(items),
        "gamma": drafts,
        "nodes": nodes,
        "plain": columns["plain"].as_dict(),
        "speculative": columns["speculative"].as_dict(),
        "identical": sum(bool(item.identical) for item in items),
        "verify_cost": costs.curve,
        "verify_seconds": costs.verify,
        "draft_cost": costs.draft_cost,
        "expected_speedup": None if forwards is None else costs.speedup(forwards, nodes),
        "measured_speedup": speedup(columns),
        "speedup_quartiles": speedup_quartiles(items),
    }


def markdown(result: dict[str, Any]) -> str:
    """The report for people: what was decoded, a line for each part where there are several, then each part."""
    decode, parts = result["decode"], result["parts"]
    chosen = f"0 to {parts[0]['gamma']}, chosen each round" if decode["auto"] else str(parts[0]["gamma"])
    tree = "" if decode["tree"] == "none" else f" in {decode['tree']} trees of {counted(parts[0]['nodes'], 'node')}"
    lossy = ", typical acceptance (lossy)" if decode["verify"] == "typical" else ""
    lines = [
        f"# Decoding with drafts: step {result['step']}",
        "",
        f"{decode['dtype']}, {decode['batch']} at a time; drafts by {decode['drafter']}{tree}, γ = {chosen}{lossy}.",
    ]
    if len(parts) > 1:
        depths = range(1, parts[0]["gamma"] + 1)
        titles = ["prompts", "temperature", *(f"depth {k}" for k in depths), "tokens a forward", "speedup", "expected"]
        lines += ["", f"| {' | '.join(titles)} |"]
        lines.append("|---" * (5 + len(depths)) + "|")
        for part in parts:
            shares = part["speculative"]["acceptance"] + [None] * len(depths)
            cells = [part["file"], f"{part['temperature']:g}", *(_shown(share) for share in shares[: len(depths)])]
            cells += [_shown(part["speculative"]["tokens_per_forward"]), _shown(part["measured_speedup"])]
            lines.append("| " + " | ".join([*cells, _shown(part["expected_speedup"])]) + " |")
    for part in parts:
        lines += ["", *_section(part, decode)]
    return "\n".join(lines) + "\n"


def _section(part: dict[str, Any], decode: dict[str, Any]) -> list[str]:
    plain, fast = part["plain"], part["speculative"]
    greedy = part["temperature"] == 0
    how = "greedy" if greedy else f"temperature {part['temperature']:g}"
    quartiles = part["speedup_quartiles"]
    spread = f" (half of the prompts: {quartiles[0]:.2f} to {quartiles[1]:.2f})" if quartiles else ""
    lines = [
        f"## {part['file']}, {how}: {counted(part['prompts'], 'prompt')}",
        "",
        "| | plain | speculative |",
        "|---|---|---|",
        f"| tokens | {plain['tokens']} | {fast['tokens']} |",
        f"| tokens a forward | {_shown(plain['tokens_per_forward'])} | {_shown(fast['tokens_per_forward'])} |",
        f"| tokens/s after the prompt | {_shown(plain['tokens_per_second'], 1)} | {_shown(fast['tokens_per_second'], 1)} |",
        *(
            f"| {title} | {_bytes(plain['cache_bytes_per_token'][name])} | {_bytes(fast['cache_bytes_per_token'][name])} |"
            for name, title in CACHE_ROWS.items()
        ),
        "",
        f"Speedup: {_shown(part['measured_speedup'])} measured{spread}, {_shown(part['expected_speedup'])} expected of "
        "E / (v(n+1) + n c), n drafts a forward" + (" at the largest γ" if decode["auto"] else "") + ".",
    ]
    if greedy:
        lines.append(f"Texts identical to plain greedy decoding: {part['identical']} of {part['prompts']}.")
    lines += ["", "| depth | accepted | of those reached | v(depth + 1) |", "|---|---|---|---|"]
    for k, (share, conditional) in enumerate(zip(fast["acceptance"], fast["conditional_acceptance"], strict=True)):
        lines.append(f"| {k + 1} | {_shown(share)} | {_shown(conditional)} | {_shown(part['verify_cost'][k + 1])} |")
    lines += ["", f"One draft costs c = {_shown(part['draft_cost'])} of a pass over one token.", ""]
    lines += ["| tokens of a forward | forwards |", "|---|---|"]
    return lines + [f"| {n} | {times} |" for n, times in enumerate(fast["histogram"]) if n]


def _write(place: Path, result: dict[str, Any]) -> None:
    from mtp_dist.tracking.decode_plot import draw

    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / NAMES[0]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (place / NAMES[1]).write_text(markdown(result), encoding="utf-8")
        draw(result).savefig(place / NAMES[2], dpi=120)
    except OSError as error:
        raise UserError(f"output={place} cannot be written: {error.strerror}") from None


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
