"""Promise: no single bit of any file of a checkpoint changes unseen."""

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.bit_flips import flip, places
from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.manifest import MANIFEST, MANIFEST_SUM
from mtp_dist.errors import UserError

FLIPS = 200


def unsound(path: Path) -> bool:
    try:
        folder.sound(path)
    except UserError:
        return True
    return False


def test_every_flip_is_found(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Two hundred bits at random, the same number in each file: the small ones must be hit as well."""
    path = shutil.copytree(checkpoints["tied"], tmp_path / "copy")
    assert folder.sound(path) == path
    drawn = places(path, FLIPS, random.Random(11))
    assert {file.name for file, _ in drawn} == {file.name for file in path.iterdir()} >= {MANIFEST, MANIFEST_SUM}
    for file, bit in drawn:
        with flip(file, bit):
            assert unsound(path), f"bit {bit} of {file.name} changed unseen"
    assert folder.sound(path) == path, "every flip was taken back"


def test_every_bit_of_the_manifests_sum_counts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Hexadecimal in capitals, or another end of line, is a flipped bit, too."""
    path = shutil.copytree(checkpoints["tied"], tmp_path / "copy")
    for bit in range(8 * (path / MANIFEST_SUM).stat().st_size):
        with flip(path / MANIFEST_SUM, bit):
            assert unsound(path), f"bit {bit} changed unseen"


def test_a_newer_checkpoint_that_is_passed_over_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    older, newer = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shutil.copytree(checkpoints["tied"], older)
    shutil.copytree(checkpoints["tied"], newer)
    with (newer / "config.yaml").open("ab") as file:
        file.write(b"#")
    assert folder.sound(tmp_path) == older
    said = capfd.readouterr().err
    assert "passed over: step_00000002 is damaged (config.yaml" in said
