"""Promise: whatever ends a run's processes, and whatever disk, console or dataset fails, nothing is left behind, one line says
why, what can be saved is saved, and status.json tells the truth. Real launchers, torchruns and ranks."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.exit_codes import STOPPED
from mtp_dist.run_lock import held
from mtp_dist.tracking.jsonl import read_records
from mtp_dist.training.status import current, read_status
from tests.distributed.pool import ROOT
from tests.distributed.ranks import Ranks, freeze, output, settings
from tests.distributed.test_disk import mount
from tests.distributed.test_end import LAYOUT, endless, last_step, launched
from tests.distributed.test_kill import wait_for_step


def family(launcher: "subprocess.Popen[str]") -> tuple[psutil.Process, list[psutil.Process]]:
    """torchrun and its ranks, as soon as both ranks are there."""
    while True:
        assert launcher.poll() is None, launcher.communicate()[1]
        children = psutil.Process(launcher.pid).children()
        ranks = children[0].children() if children else []
        if len(ranks) == 2:
            return children[0], ranks


def launch(run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), f"run_dir={run}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def require_nothing_left(run: Path, processes: list[psutil.Process]) -> None:
    assert psutil.wait_procs(processes, timeout=100)[1] == []
    with held(run, wait_seconds=60):
        pass


@pytest.mark.parametrize("killed", ["torchrun", pytest.param("launcher", marks=pytest.mark.full)])
def test_ranks_save_and_stop_when_what_started_them_is_killed(tmp_path: Path, tiny_dataset: Path, killed: str) -> None:
    run = endless(tmp_path / "run", tiny_dataset)
    launcher, found = launched(run)
    torchrun, ranks = family(launcher)
    assert {rank.pid for rank in ranks} == {rank.pid for rank in found.values()}
    (torchrun if killed == "torchrun" else launcher).kill()
    _, errors = launcher.communicate(timeout=200)
    require_nothing_left(run, [torchrun, *ranks])
    state = read_status(run)
    assert state is not None and (state.state, state.step) == ("stopped", last_step(run))
    assert [path.name for path in folder.complete(run / "checkpoints")] == [folder.name_of(state.step)]
    if killed == "torchrun":
        assert launcher.returncode == STOPPED
        said = [line for line in errors.splitlines() if "error" in line]
        assert said == [f"error: torchrun (process {torchrun.pid}) was killed by signal 9; its ranks end, too"], errors
        assert f"the ranks have saved step {state.step}" in errors


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("killed", ["torchrun", "launcher"])
def test_killed_at_any_moment_of_a_start_and_in_saves(tmp_path: Path, tiny_dataset: Path, killed: str) -> None:
    """In imports, before the ranks meet, while they build the model, between steps and in saves."""
    run = freeze(settings(LAYOUT, tiny_dataset, tmp_path / "run", 100_000))
    for number in range(10):
        launcher = launch(run)
        torchrun, ranks = family(launcher)
        if number < 6:
            psutil.wait_procs(ranks, timeout=1.3 * number)
        else:
            begun = last_step(run)
            while last_step(run) < begun + number:
                assert launcher.poll() is None, launcher.communicate()[1]
        (torchrun if killed == "torchrun" else launcher).kill()
        launcher.communicate(timeout=200)
        require_nothing_left(run, [torchrun, *ranks])
        state = read_status(run)
        assert state is None or state.state in ("stopped", "killed"), state
        for path in folder.complete(run / "checkpoints"):
            assert Checkpoint(path).damages() == []
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.full
def test_a_rank_that_was_killed_leaves_a_run_that_does_not_say_it_runs(tmp_path: Path, tiny_dataset: Path) -> None:
    """Where every process was killed, nobody can write it: whoever looks next says so."""
    run = endless(tmp_path / "run", tiny_dataset)
    ranks = Ranks(run)
    wait_for_step(run, 1, ranks)
    for rank in (0, 1):
        ranks.kill(rank)
    ranks.wait()
    before = read_status(run)
    assert before is not None and before.state == "running"
    after = current(run)
    assert after is not None and after.state == "killed"


def test_a_signal_before_the_first_step_stops_a_job_of_several_machines(tmp_path: Path, tiny_dataset: Path) -> None:
    """One rank gets it while it starts; those of other machines would wait for it, so all begin and leave together."""
    run = endless(tmp_path / "run", tiny_dataset)
    ranks = Ranks(run)
    while not catches(ranks.processes[1].pid, signal.SIGTERM):
        assert ranks.processes[1].is_alive(), output(run)
    ranks.kill(1, signal.SIGTERM)
    assert ranks.wait() == [STOPPED, STOPPED], output(run)
    state = read_status(run)
    assert state is not None and state.state == "stopped"
    assert "Traceback" not in output(run)


def catches(pid: int | None, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    words = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()
    return bool(int(words[0], 16) >> (number - 1) & 1)


def test_a_console_that_is_gone_does_not_end_a_run_and_a_finished_one_says_so(tmp_path: Path, tiny_dataset: Path) -> None:
    run = freeze(settings(LAYOUT, tiny_dataset, tmp_path / "run", 6, train__progress=True, train__log_every_steps=1))
    launcher = launch(run)
    for stream in (launcher.stdout, launcher.stderr):
        assert stream is not None
        stream.readline()
        stream.close()
    assert launcher.wait(200) == 0
    state = read_status(run)
    assert state is not None and (state.state, state.step) == ("finished", 6)
    again = launch(run)
    said, errors = again.communicate(timeout=100)
    assert (again.returncode, errors) == (0, "")
    assert f"{run} is finished: step 6 of 6" in said and "nothing to train" in said


@pytest.mark.full
def test_a_finished_run_with_a_damaged_checkpoint_is_trained_to_its_end_again(tmp_path: Path, tiny_dataset: Path) -> None:
    run = freeze(settings(LAYOUT, tiny_dataset, tmp_path / "run", 3))
    assert Ranks(run).wait() == [0, 0], output(run)
    newest = folder.complete(run / "checkpoints")[-1]
    with (newest / "rank_00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    repaired = launch(run)
    said, errors = repaired.communicate(timeout=200)
    assert repaired.returncode == 0, errors
    assert "damaged" in errors and "nothing to train" not in said
    assert Checkpoint(folder.complete(run / "checkpoints")[-1]).damages() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two pages: some lines, and then none."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk; run the tests as root to see this one")
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def ended_with_one_line(run: Path) -> str:
    """That line. The run was saved at its last step."""
    errors = [line for line in output(run).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output(run)
    assert "Traceback" not in output(run)
    assert "not written" not in errors[0]
    state = read_status(run)
    assert state is not None and state.state == "failed" and state.step > 0
    newest = folder.complete(run / "checkpoints")[-1]
    assert folder.step_of(newest) == state.step
    assert Checkpoint(newest).damages() == []
    return errors[0]


def test_metrics_that_cannot_be_written(tmp_path: Path, tiny_dataset: Path, small_disk: Path) -> None:
    run = endless(tmp_path / "run", tiny_dataset, train__log_every_steps=1)
    (run / "metrics.jsonl").symlink_to(small_disk / "metrics.jsonl")
    assert Ranks(run).wait() == [2, 2], output(run)
    assert f"{run}/metrics.jsonl: No space left on device" in ended_with_one_line(run)


def test_a_dataset_that_vanishes(tmp_path: Path, tiny_dataset: Path) -> None:
    data = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    run = endless(tmp_path / "run", data)
    ranks = Ranks(run)
    wait_for_step(run, 2, ranks)
    data.rename(tmp_path / "away")
    assert ranks.wait() == [2, 2], output(run)
    line = ended_with_one_line(run)
    assert str(data) in line and "No such file" in line
