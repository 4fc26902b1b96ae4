"""A real Slurm of two nodes on this machine, for the tests that need one, in a folder of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL_CLUSTER = REPOSITORY / "slurm" / "local_cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """The commands of one running cluster."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=REPOSITORY, timeout=120)

    def output(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        """``python launch/slurm.py`` with these overrides."""
        return self.run(sys.executable, "launch/slurm.py", *overrides)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        text = self.output("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, what: str, condition: Callable[[], bool], log: Path, seconds: float = 400) -> None:
        """Until the condition holds; fails with the job's log where it does not come true."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"{what} did not happen; the job's log:\n{log.read_text() if log.exists() else '(none)'}")
            time.sleep(0.2)


def _cluster_command(environment: Mapping[str, str], command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(LOCAL_CLUSTER), command], capture_output=True, text=True, env=environment, timeout=180)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm is not installed here (missing: {', '.join(missing)}); on Debian and Ubuntu: slurm-wlm and munge")
    # Not tmp_path: the path of a unix socket is short.
    folder = tempfile.gettempdir()
    root = tempfile.mkdtemp(prefix="slurm-", dir=folder if len(folder) <= 40 else "/tmp")
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MTP_DIST_SLURM_"))}
    environment = outer | {"PATH": path, "MTP_DIST_SLURM_ROOT": root, "SLURM_CONF": f"{root}/slurm.conf"}
    started = _cluster_command(environment, "start")
    try:
        assert started.returncode == 0, started.stderr
        yield Cluster(environment)
    finally:
        _cluster_command(environment, "stop")
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of generated text, a byte a token."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(80):
        lines = [f"document {number} line {line} holds the square {line**2} and the sum {line + number}" for line in range(40)]
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines))
    command = [sys.executable, "data/build_shards.py", "source=text", f"input=[{folder / 'text'}]", f"out={folder / 'shards'}"]
    done = subprocess.run([*command, "tokenizer=bytes"], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "shards"
