"""Promise: a disk that is full, or that nobody may write, ends the run with one line that says so and keeps the last good
checkpoint, from which the run goes on once there is room. Real file systems: small ones in memory, mounted over the checkpoints
folder."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.fault import VARIABLE
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.ranks import Ranks, freeze, output, settings

LAYOUT, STEPS = "pp2_zbv", 5


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def run(tmp_path: Path, tiny_dataset: Path) -> Iterator[Path]:
    """A run whose checkpoints lie on a file system of their own, large enough at first."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk; run the tests as root to see this one")
    made = freeze(settings(LAYOUT, tiny_dataset, tmp_path / "run", STEPS))
    (made / "checkpoints").mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(made / "checkpoints"))
    try:
        yield made
    finally:
        subprocess.run(["umount", "--lazy", str(made / "checkpoints")], check=True)


def remount(run: Path, options: str) -> None:
    mount("-o", f"remount,{options}", str(run / "checkpoints"))


def first_checkpoint(run: Path) -> Path:
    """The run with one checkpoint, of step 1."""
    assert 0 not in Ranks(run, {VARIABLE: "latest.after:0"}).wait()
    [made] = folder.complete(run / "checkpoints")
    return made


def end_in_one_line(run: Path, why: str, kept: Path) -> None:
    (run / "output.0.txt").unlink(missing_ok=True)
    (run / "output.1.txt").unlink(missing_ok=True)
    assert Ranks(run).wait() == [2, 2], output(run)
    errors = [line for line in output(run).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, "one line, not one a rank"
    assert why in errors[0] and "not written" in errors[0] and "untouched" in errors[0]
    assert "Traceback" not in output(run)
    assert Checkpoint(kept).damages() == []
    assert '"failed"' in (run / "status.json").read_text()


def go_on(run: Path) -> None:
    assert Ranks(run).wait() == [0, 0], output(run)
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [path.name for path in folder.complete(run / "checkpoints")] == [folder.name_of(step) for step in (STEPS - 1, STEPS)]


def test_a_full_disk(run: Path) -> None:
    kept = first_checkpoint(run)
    size = sum(path.stat().st_size for path in kept.iterdir())
    remount(run, f"size={int(1.6 * size)}")
    end_in_one_line(run, "No space left on device", kept)
    assert [path.name for path in folder.complete(run / "checkpoints")] == [kept.name]
    assert not list((run / "checkpoints").glob("*.tmp-*")), "what could not be finished takes no room"
    remount(run, "size=64m")
    go_on(run)


def test_a_disk_that_is_read_only(run: Path) -> None:
    kept = first_checkpoint(run)
    remount(run, "ro")
    end_in_one_line(run, "Read-only file system", kept)
    remount(run, "rw")
    go_on(run)
