"""Promises, each kept by a real Slurm of two nodes on this machine: a job of two nodes with two processes each trains, stops when
it is asked to, goes back into the queue by itself and resumes to the end; a failing run stays down; Slurm reads every value as it
was given; starting the local cluster twice is starting it once."""

import json
import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mtp_dist.tracking.jsonl import read_records

from .conftest import ENDED, LOCAL_CLUSTER, REPOSITORY, Cluster

pytestmark = pytest.mark.slurm

STEPS = 40


def overrides(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "launch=slurm",
        f"run_dir={run_dir}",
        f"data.path={dataset}",
        "model=tiny",
        f"train.steps={STEPS}",
        "train.global_batch=8",
        "train.micro_batch=1",
        "train.sequence_length=32",
        "train.dtype=bfloat16",
        "zero.stage=1",
        "parallel.pipeline=2",
        "parallel.tensor=1",
        "parallel.data=2",
        "tracker=disabled",
        "launch.nodes=2",
        "launch.device=cpu",
        "launch.threads=1",
        "launch.time=15:00",
        *more,
    ]


def submitted(cluster: Cluster, *words: str) -> str:
    done = cluster.submit(*words)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("submitted job ")
    return first.removeprefix("submitted job ")


def test_two_nodes_train_requeue_and_resume_to_the_end(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    job = submitted(cluster, *overrides(dataset, run_dir))
    log = run_dir / f"slurm-{job}.out"
    cluster.wait("the third step", lambda: len(read_records(metrics)) >= 3, log)
    cluster.output("scancel", "--batch", "--signal=USR1", job)
    cluster.wait("the requeue", lambda: cluster.job(job)["Restarts"] == "1", log)
    before = read_records(metrics)
    stopped_at = before[-1]["step"]
    assert 3 <= stopped_at < STEPS, log.read_text()

    cluster.wait("the end", lambda: cluster.job(job)["JobState"] in ENDED, log)
    text = log.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped and saved; put in the queue again" in text
    assert "nodes node1 node2" in text
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    records = read_records(metrics)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    # The same numbers, times included: these steps were not trained again.
    assert records[: len(before)] == before
    assert all(math.isfinite(record["loss/total"]) for record in records)
    assert not list(run_dir.glob(".preflight*"))


@pytest.mark.full
def test_a_node_that_dies_and_comes_back_unnoticed_costs_a_requeue(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """Everything of one node is killed and its slurmd started again before Slurm misses it: srun alone would wait for ever."""
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    more = ["checkpoint.every_steps=5", "train.steps=80", "launch.signal_seconds=30"]
    job = submitted(cluster, *overrides(dataset, run_dir, *more))
    log = run_dir / f"slurm-{job}.out"
    cluster.wait("the tenth step", lambda: len(read_records(metrics)) >= 10, log)
    launcher = psutil.Process(int((run_dir / ".launcher-node2").read_text()))
    daemon = psutil.Process(int((Path(cluster.environment["MTP_DIST_SLURM_ROOT"]) / "run" / "slurmd-node2.pid").read_text()))
    step = launcher.parent()
    assert step is not None
    node = [daemon, step, *launcher.children(recursive=True), launcher]
    for process in node:
        process.kill()
    psutil.wait_procs(node, timeout=30)
    cluster.output("bash", str(LOCAL_CLUSTER), "start")
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] in ENDED, log)
    assert cluster.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert cluster.job(job)["Restarts"] == "1"
    assert "a node is lost; put in the queue again" in log.read_text()
    assert [record["step"] for record in read_records(metrics)] == list(range(1, 81))


def test_a_run_that_fails_stays_down(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    frozen = run_dir / "resolved.yaml"
    job = submitted(cluster, *overrides(dataset, run_dir, "launch.directives=[--hold]"))
    # Settings that no check has seen: every process refuses them.
    frozen.write_text(frozen.read_text().replace("hidden: ", "hidden: -"))
    cluster.output("scontrol", "release", job)
    log = run_dir / f"slurm-{job}.out"
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] in ENDED, log)
    assert cluster.job(job)["JobState"] == "FAILED", log.read_text()
    assert cluster.job(job)["Restarts"] == "0"
    assert "It is not put in the queue again" in log.read_text()


def test_a_node_without_space_stops_the_job_before_it_starts(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # More than any disk has.
    job = submitted(cluster, *overrides(dataset, run_dir, "launch.setup=['export MTP_DIST_MIN_FREE_GIB=999999999']"))
    log = run_dir / f"slurm-{job}.out"
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] in ENDED, log)
    assert cluster.job(job)["JobState"] == "FAILED"
    assert "999999999 are needed (MTP_DIST_MIN_FREE_GIB)" in log.read_text()
    assert "preflight failed; nothing was started" in log.read_text()
    assert not (run_dir / "metrics.jsonl").exists()


def test_slurm_reads_every_value_as_it_was_given(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "50% \"off\" 'here' $HOME"
    name = "a \"b\" 'c' $(x) #d \\e"
    # Ends in the preflight: only the script's own values matter here.
    more = [f"launch.job_name={name}", "launch.setup=['export MTP_DIST_MIN_FREE_GIB=999999999']"]
    job = submitted(cluster, *overrides(dataset, run_dir, *more))
    log = run_dir / f"slurm-{job}.out"
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] in ENDED, log)
    assert cluster.output("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%j").rstrip("\n") == name
    assert f"GiB are free in {run_dir}; 999999999 are needed" in log.read_text()


def test_slurm_refusing_a_job_is_one_line(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    done = cluster.submit(*overrides(dataset, tmp_path / "run", "launch.partition=no_such_partition"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: Slurm refused ")
    assert "invalid partition specified: no_such_partition" in done.stderr


def test_dry_run_prints_and_writes_nothing(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    done = cluster.submit(*overrides(dataset, tmp_path / "run", "dry_run=true"))
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_what_submitting_refuses(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    asked = overrides(dataset, tmp_path / "run", f"tokenizer.path={tmp_path / 'none.json'}")
    for words in (asked, [*asked, "dry_run=true"]):
        done = cluster.submit(*words)
        assert done.returncode == 2
        assert "tokenizer.path=" in done.stderr and "does not exist" in done.stderr
    assert not list(tmp_path.iterdir())


def test_srun_alone_starts_the_processes_of_a_run(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """No torchrun: each task of a step over two nodes is one process."""
    run_dir = tmp_path / "run"
    more = ["train.steps=3", "train.progress=false"]
    cluster.output(sys.executable, "-m", "mtp_dist.freezing", *overrides(dataset, run_dir, *more))
    task = (sys.executable, "-m", "mtp_dist.train", f"run_dir={run_dir}")
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks=4", "--overcommit", "--kill-on-bad-exit=1", *task],
        capture_output=True, text=True, env=cluster.environment, cwd=REPOSITORY, timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert [record["step"] for record in read_records(run_dir / "metrics.jsonl")] == [1, 2, 3]
    # One task is a shell as any: settings are composed there, and refused in its way.
    shell = cluster.run("srun", "--ntasks=1", *task, "model.layers=5")
    assert "set model.layers=" in shell.stderr
    wrong = cluster.run("srun", "--ntasks=2", "--overcommit", *task)
    assert "SLURM_STEP_NUM_TASKS=2 processes were started" in wrong.stderr


def test_starting_twice_is_starting_once(cluster: Cluster) -> None:
    def daemons() -> str:
        root = Path(cluster.environment["MTP_DIST_SLURM_ROOT"])
        return " ".join(path.read_text().strip() for path in sorted((root / "run").glob("*.pid")))

    before = daemons()
    cluster.output("bash", str(LOCAL_CLUSTER), "start")
    assert daemons() == before
    assert cluster.output("bash", str(LOCAL_CLUSTER), "env").strip() == f"export SLURM_CONF={cluster.environment['SLURM_CONF']}"


def test_an_overlong_root_is_refused(cluster: Cluster) -> None:
    environment = cluster.environment | {"MTP_DIST_SLURM_ROOT": "/tmp/" + "x" * 80}
    done = subprocess.run(["bash", str(LOCAL_CLUSTER), "start"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "unix sockets" in done.stderr
