"""Checkpoints in words: what one holds, and in what two differ. Reads manifests and settings; torch only to compare values."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.manifest import Manifest, damage, read_manifest
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config import compose
from mtp_dist.quantity import counted

SHOWN = 10


def describe(path: Path, *, parameters: bool) -> str:
    """What the manifest says, a line a subject. Raises UserError where it is damaged."""
    manifest = read_manifest(path)
    progress, layout = manifest.progress, manifest.layout
    seen, trained, skipped = (progress.get(name, 0) for name in ("tokens_seen", "tokens_trained", "skipped"))
    tokens = counted(seen, "token", commas=True)
    rows = [
        ("checkpoint", str(path)),
        ("format", manifest.format),
        ("step", f"{manifest.step} ({tokens} seen, {trained:,} trained, {counted(skipped, 'step')} skipped)"),
        ("optimizer", _pairs(manifest.optimizer)),
        ("heads", _pairs(manifest.contract)),
        ("saved under", _layout(layout)),
        ("data", _data(manifest.data)),
        ("tracker", _pairs(manifest.tracker)),
        ("versions", _pairs(manifest.versions)),
        ("parameters", _sizes(manifest)),
        ("files", _files(manifest)),
    ]
    text = _table(rows)
    return f"{text}\n{_table(_parameter_rows(manifest))}" if parameters else text


def damages(path: Path) -> list[str]:
    """What is wrong with its files; reads all of them. Raises UserError where the manifest is damaged."""
    return [found for name, record in sorted(read_manifest(path).files.items()) if (found := damage(path, name, record))]


def compare(one: Path, other: Path, *, all_parameters: bool) -> str:
    """In what two checkpoints differ: settings, what the manifests say, parameters, and their values.

    A value's difference is given as the largest of its parameter, and over the largest absolute value of the first one's."""
    first, second = read_manifest(one), read_manifest(other)
    sections = {
        "settings": [
            (key, f"{was} -> {now}")
            for key, was, now in compose.differences(
                load_settings(one, first), load_settings(other, second)
            )
        ],
        "manifest": list(_manifest_differences(first, second)),
        "shapes": list(_shape_differences(first, second)),
    }
    parts = [f"{name} that differ:\n{_table(rows)}" if rows else f"{name}: the same" for name, rows in sections.items()]
    return "\n".join([f"from {one}\nto   {other}", *parts, _value_differences(one, other, first, second, all_parameters)])


def _manifest_differences(first: Manifest, second: Manifest) -> Iterator[tuple[str, str]]:
    for name in ("format", "step"):
        yield from _differing(name, getattr(first, name), getattr(second, name))
    for name in ("progress", "optimizer", "contract", "layout", "tracker", "versions"):
        was, now = getattr(first, name), getattr(second, name)
        for key in sorted({*was, *now}):
            yield from _differing(f"{name}.{key}", was.get(key), now.get(key))
    yield from _differing("data", _data(first.data), _data(second.data))


def _differing(name: str, was: Any, now: Any) -> Iterator[tuple[str, str]]:
    if was != now:
        yield name, f"{was} -> {now}"


def _shape_differences(first: Manifest, second: Manifest) -> Iterator[tuple[str, str]]:
    for name in sorted({*first.parameters, *second.parameters}):
        was, now = (manifest.parameters.get(name) for manifest in (first, second))
        if was is None or now is None:
            yield name, "only in the second" if was is None else "only in the first"
        elif was.shape != now.shape:
            yield name, f"{was.shape} -> {now.shape}"


def _value_differences(one: Path, other: Path, first: Manifest, second: Manifest, all_parameters: bool) -> str:
    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.parallel.engine import PARTS

    common = [
        name
        for name, record in first.parameters.items()
        if name in second.parameters and second.parameters[name].shape == record.shape
    ]
    readers, found = (Checkpoint(one), Checkpoint(other)), []
    for name in common:
        for part in PARTS:
            was, now = (reader.read(name, part) for reader in readers)
            if not was.equal(now):
                largest = (was - now).abs().max().item()
                found.append((largest / (was.abs().max().item() or math.inf), largest, f"{name} {part}"))
    if not found:
        return f"values: the same bits in all {counted(len(common), 'parameter')} of both"
    found.sort(reverse=True)
    shown = found if all_parameters else found[:SHOWN]
    rows = [(name, f"{largest:.3e} ({relative:.3e} of its largest)") for relative, largest, name in shown]
    more = f"\n  and {len(found) - len(shown)} more (parameters=true lists them)" if len(shown) < len(found) else ""
    return f"values that differ: {len(found)} of {len(common) * len(PARTS)}\n{_table(rows)}{more}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _layout(layout: dict[str, Any]) -> str:
    sizes = " x ".join(f"{axis} {layout.get(axis)}" for axis in ("pipeline", "data", "tensor"))
    processes = counted(layout.get("world", 0), "process", "processes")
    return f"{sizes}, schedule {layout.get('schedule')}, ZeRO {layout.get('zero')}, {processes}"


def _data(data: dict[str, Any]) -> str:
    lanes, order = data.get("lanes", {}), data.get("order", {})
    if not isinstance(lanes, dict) or not isinstance(order, dict) or not lanes:
        return "none"
    epochs = sorted({str(place.get("epoch")) for place in lanes.values() if isinstance(place, dict)})
    return f"{len(lanes)} lanes in epoch {' and '.join(epochs)}, dataset {order.get('fingerprint')}"


def _sizes(manifest: Manifest) -> str:
    heads = sum(math.prod(record.shape) for name, record in manifest.parameters.items() if name.startswith("mtp."))
    whole = sum(math.prod(record.shape) for record in manifest.parameters.values())
    fragments = sum(len(record.fragments) for record in manifest.parameters.values())
    return f"{len(manifest.parameters)} with {whole:,} values ({heads:,} of them in the heads), in {fragments} fragments"


def _files(manifest: Manifest) -> str:
    total = sum(record.size for record in manifest.files.values())
    return f"{len(manifest.files)}, {total:,} bytes: {', '.join(sorted(manifest.files))}"


def _parameter_rows(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (name, f"{record.shape} in {len(record.fragments)} fragments{'' if record.moments else ', frozen'}")
        for name, record in manifest.parameters.items()
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
