"""Where ``conf/`` is: inside the package when it was installed as a wheel, beside the package in a checkout."""

from functools import cache
from pathlib import Path

from mtp_dist.errors import UserError


@cache
def conf_folder() -> Path:
    """The absolute path of ``conf/``. Raises UserError when neither place holds it."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "conf", package.parent / "conf"]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise UserError(f"conf/train.yaml is missing in {places[0]} and in {places[1]}; install mtp_dist again")


def groups() -> dict[str, list[str]]:
    """Each group of ``conf/`` -> its options, both sorted: {"model": ["125m", ...], ...}."""
    folders = sorted(entry for entry in conf_folder().iterdir() if entry.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
