"""Start-up check of the libraries whose internals matter here, against the exact pins in the package's own requirements.

``pyproject.toml`` is the single source: its ``name==version`` lines travel in the installed metadata.
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping

from mtp_dist.errors import UserError

ALLOW = "MTP_DIST_ALLOW_VERSIONS"
OLDEST_TORCH = (2, 11)

_PIN = re.compile(r"\s*([A-Za-z0-9._-]+)\s*==\s*([A-Za-z0-9.]+)\s*")


def check() -> None:
    """Compare what is installed with the pins. Warnings go to the standard error; raises UserError (see ``findings``)."""
    try:
        pins = exact_pins(importlib.metadata.requires("mtp_dist") or [])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "mtp_dist is not installed, only what it needs; run in its folder: bash launch/install.sh (or pip install -e .)"
        ) from None
    warnings, errors = findings(pins, {name: _installed(name) for name in pins})
    if errors and os.environ.get(ALLOW) != "1":
        raise UserError(errors[0])
    for line in [*warnings, *errors]:
        print(f"warning: {line}", file=sys.stderr)


def exact_pins(requirements: list[str]) -> dict[str, str]:
    """Distribution name -> version, of the requirements of the form ``name==version`` that hold without an extra."""
    matches = (_PIN.fullmatch(line) for line in requirements)
    return {match[1]: match[2] for match in matches if match}


def findings(pins: Mapping[str, str], installed: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """(warnings, errors), one line a mismatch. A torch of another version, but not an older one than 2.11, is only a warning."""
    warnings: list[str] = []
    errors: list[str] = []
    for name, pinned in pins.items():
        found = installed[name]
        # "2.13.0+cpu" is 2.13.0 built for one kind of machine.
        if found is not None and found.partition("+")[0] == pinned:
            continue
        if name == "torch" and found is not None and _numbers(found) >= OLDEST_TORCH:
            warnings.append(f"torch {found} is installed, mtp_dist is tested with {pinned}; pip install torch=={pinned}")
            continue
        state = "is not installed" if found is None else f"{found} is installed"
        errors.append(f"{name} {state}, mtp_dist needs {pinned}; pip install {name}=={pinned} (or set {ALLOW}=1)")
    return warnings, errors


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(name: str) -> tuple[int, ...]:
    """The first two numbers of an installed distribution's version; of one that is not installed, none."""
    return _numbers(_installed(name) or "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
