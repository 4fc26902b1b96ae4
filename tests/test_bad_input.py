"""Promise: whatever is wrong with a command, the answer is one line that names the setting, and exit status 2, before any process
of a job starts. Every case is a real command."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtp_dist.config.schema import ShardBuild, TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.run_lock import held

ROOT = Path(__file__).parents[1]
TRAIN = [sys.executable, "-m", "mtp_dist.train"]
LAUNCH = [sys.executable, str(ROOT / "launch" / "torchrun.py")]
BUILD = [sys.executable, str(ROOT / "data" / "build_shards.py")]
TINY = [
    "model.hidden=32",
    "model.mlp=48",
    "train.steps=2",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.sequence_length=16",
    "train.dtype=float32",
    "tracker=disabled",
    "launch.device=cpu",
    "launch.threads=1",
]


@dataclass
class Place:
    """A dataset, another one with a tokenizer of its own, and a folder for runs."""

    data: Path
    other_data: Path
    folder: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number}: " + "the quick brown fox jumps over the lazy dog " * 5)
    for name, tokenizer in (("data", TokenizerConfig(kind="bytes")), ("other", TokenizerConfig(kind="bpe", vocab_size=300))):
        build(ShardBuild(source="text", input=[str(folder / "texts")], out=str(folder / name), tokenizer=tokenizer, workers=1))
    return Place(folder / "data", folder / "other", folder)


def answer(command: list[str], *, cwd: Path, **environment: str) -> str:
    """The one line that a command which must fail says."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.dmi=3"], ["model.dmi"]),
        (["+model.dmi=3"], ["model.dmi"]),
        (["moddel.layers=3"], ["moddel.layers", "did you mean model.layers"]),
        (["train.steps=many"], ["train.steps", "int"]),
        (["optim.lr=fast"], ["optim.lr", "number"]),
        (["train.deterministic=3.5"], ["train.deterministic", "true or false"]),
        (["parallel=v9"], ["parallel=v9"]),
        (["optim.lr=nan"], ["optim.lr=nan", "from 1e-12"]),
        (["train.compile=7"], ["train.compile=7", "true or false"]),
        (["optim.lr=${oc.env:HOME}"], ["optim.lr=${oc.env:HOME}", "no interpolation"]),
        (["batch_size=8"], ["batch_size", "did you mean train.global_batch?"]),
        (["launch.time=banana"], ["launch.time=banana", "24:00:00"]),
        (["tracker.tags=[" + "t" * 65 + "]"], ["tracker.tags", "65 characters"]),
    ],
    ids=lambda value: value[0],
)
def test_unknown_keys_and_wrong_types(place: Place, overrides: list[str], words: list[str]) -> None:
    said = answer([*TRAIN, f"run_dir={place.folder}/never", f"data.path={place.data}", *TINY, *overrides], cwd=place.folder)
    for word in words:
        assert word in said
    assert not (place.folder / "never").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensor=3"], ["parallel.tensor=3", "model.heads=4"]),
        # The byte tokenizer has 257 entries: known only from the dataset.
        (["model.vocab_size=256"], ["model.vocab_size=256", "257 entries", "choose 257 or more"]),
        (["parallel.pipeline=3"], ["model.layers=4", "parallel.pipeline=3"]),
        (["parallel.pipeline=2", "parallel.placement=[1,1,1]"], ["parallel.placement", "4 chunks"]),
        (["parallel.data=3"], ["parallel.data=3", "train.global_batch=8"]),
        (["parallel.pipeline=2", "parallel.schedule=dualpipev"], ["dualpipev", "micro-batches"]),
        (["parallel.pipeline=2", "parallel.schedule=2f2b"], ["parallel.schedule=2f2b", "1f1b"]),
        (["parallel.pipeline=2", "zero.stage=2"], ["zero.stage=2", "parallel.pipeline=2"]),
        (["zero.stage=0", "train.dtype=bfloat16"], ["zero.stage=0", "train.dtype"]),
        (["data.lanes=3"], ["data.lanes=3", "train.global_batch=8"]),
        (["parallel.data=2", "launch.nodes=2", "launch.processes_per_node=2"], ["launch.processes_per_node=2"]),
        (["model.heads=5"], ["model.heads=5"]),
        (["mtp.depth=16"], ["mtp.depth=16", "train.sequence_length=16"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_layouts_that_do_not_fit(place: Place, overrides: list[str], words: list[str]) -> None:
    said = answer([*TRAIN, f"run_dir={place.folder}/never", f"data.path={place.data}", *TINY, *overrides], cwd=place.folder)
    for word in words:
        assert word in said
    assert not (place.folder / "never").exists()


@pytest.mark.parametrize("program", [TRAIN, LAUNCH], ids=["train", "torchrun"])
def test_data_that_is_not_there(place: Place, program: list[str]) -> None:
    said = answer([*program, f"run_dir={place.folder}/never", f"data.path={place.folder}/nothing", *TINY], cwd=place.folder)
    assert f"data.path={place.folder}/nothing" in said
    assert "build_shards.py" in said
    assert "data.path" in answer([*program, f"run_dir={place.folder}/never", *TINY], cwd=place.folder)
    assert not (place.folder / "never").exists()


def test_a_dataset_that_lost_a_shard(place: Place) -> None:
    torn = place.folder / "torn"
    shutil.copytree(place.data, torn)
    shard = next(torn.rglob("*.tar"))
    shard.unlink()
    said = answer([*TRAIN, f"run_dir={place.folder}/never", f"data.path={torn}", *TINY], cwd=place.folder)
    assert shard.name in said
    assert "build the dataset again" in said


@pytest.mark.parametrize("program", [TRAIN, LAUNCH], ids=["train", "torchrun"])
def test_a_tokenizer_that_did_not_make_the_shards(place: Place, program: list[str]) -> None:
    other = place.other_data / "tokenizer.json"
    settings = [f"run_dir={place.folder}/never", f"data.path={place.data}", *TINY]
    said = answer([*program, *settings, f"tokenizer.path={other}"], cwd=place.folder)
    assert f"tokenizer.path={other}" in said
    assert str(place.data) in said
    replaced = place.folder / f"replaced-{program is LAUNCH}"
    shutil.copytree(place.data, replaced)
    shutil.copyfile(other, replaced / "tokenizer.json")
    said = answer([*program, f"run_dir={place.folder}/never", f"data.path={replaced}", *TINY], cwd=place.folder)
    assert f"{replaced}/tokenizer.json" in said
    assert not (place.folder / "never").exists()


def test_no_run_folder_and_one_that_cannot_be_written(place: Place) -> None:
    data = f"data.path={place.data}"
    assert "run_dir" in answer([*TRAIN, data, *TINY], cwd=place.folder)
    (place.folder / "file").write_text("")
    for run_dir in (place.folder / "file" / "run", Path("/proc/run")):
        assert f"run_dir={run_dir}" in answer([*TRAIN, f"run_dir={run_dir}", data, *TINY], cwd=place.folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder; run the tests as another user to see this one")
def test_a_run_folder_without_write_permission(place: Place) -> None:
    locked = place.folder / "locked"
    locked.mkdir(mode=0o555)
    said = answer([*TRAIN, f"run_dir={locked}/run", f"data.path={place.data}", *TINY], cwd=place.folder)
    assert f"run_dir={locked}/run" in said


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "theirs"},
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["torchrun", "srun"],
)
def test_composing_in_a_process_of_a_job(place: Place, launcher: dict[str, str]) -> None:
    """Every rank would write the run folder: the right command is shown instead."""
    composing = [f"run_dir={place.folder}/never", f"data.path={place.data}", "train.steps=2"]
    said = answer([*TRAIN, *composing], cwd=place.folder, **launcher)
    assert f"python -m mtp_dist.train {' '.join(composing)}" in said
    assert "without torchrun" in said
    said = answer([*TRAIN, f"run_dir={place.folder}/never"], cwd=place.folder, **launcher)
    assert f"{place.folder}/never/resolved.yaml does not exist" in said
    assert not (place.folder / "never").exists()


@pytest.fixture(scope="module")
def trained(place: Place) -> Callable[[str], Path]:
    """A run folder of two steps, copied for each test that asks."""
    run = place.folder / "trained"
    command = [*TRAIN, f"run_dir={run}", f"data.path={place.data}", *TINY, "train.progress=false"]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    def copied(name: str) -> Path:
        return Path(shutil.copytree(run, place.folder / name))

    return copied


@pytest.mark.parametrize("program", [TRAIN, LAUNCH], ids=["train", "torchrun"])
def test_a_checkpoint_of_another_model(place: Place, trained: Callable[[str], Path], program: list[str]) -> None:
    """Also where the frozen settings are lost, or the checkpoints were copied from elsewhere. The run folder stays as it was."""
    run = trained(f"other_model-{program is LAUNCH}")
    wider = [f"run_dir={run}", f"data.path={place.data}", *TINY, "model.mlp=64"]
    for lost in ((), ("resolved.yaml",)):
        for name in lost:
            (run / name).unlink()
        before = sorted(path.name for path in run.rglob("*"))
        said = answer([*program, *wider], cwd=place.folder)
        for word in ("checkpoint", "model.mlp=48", "64", "new run_dir"):
            assert word in said
        assert sorted(path.name for path in run.rglob("*")) == before


@pytest.mark.parametrize("program", [TRAIN, LAUNCH], ids=["train", "torchrun"])
def test_a_run_folder_in_which_a_job_is_at_work(place: Place, program: list[str]) -> None:
    run = place.folder / f"busy-{program is LAUNCH}"
    with held(run):
        said = answer([*program, f"run_dir={run}", f"data.path={place.data}", *TINY], cwd=place.folder)
    for word in (f"run_dir={run}", socket.gethostname(), f"process {os.getpid()}", "stop that job"):
        assert word in said
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_world_of_another_size(place: Place, trained: Callable[[str], Path]) -> None:
    said = answer([*TRAIN, f"run_dir={trained('world')}"], cwd=place.folder, RANK="0", WORLD_SIZE="3", MTP_DIST_PARENT="0")
    assert "WORLD_SIZE=3" in said
    assert "parallel.pipeline x data x tensor" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out=x", "sorce=text"], ["sorce", "did you mean source"]),
        (["out=x", "source=books"], ["source=books", "python_stdlib"]),
        (["out=x", "shard_mb=big"], ["shard_mb", "number"]),
        (["out=x", "shard_mb=nan", "source=text", "input=[texts]", "tokenizer=bytes"], ["shard_mb=nan", "from 1e-6"]),
        (["out=x", "limit_mb=inf", "source=text", "input=[texts]", "tokenizer=bytes"], ["limit_mb=inf", "0, or"]),
        (["source=text", "input=[texts]", "tokenizer=bytes"], ["out"]),
        (["out=x", "source=text", "input=[nowhere]", "tokenizer=bytes"], ["nowhere"]),
        (["out=x", "source=text", "input=[texts]", "tokenizer=bytes", "validation_share=2"], ["validation_share=2"]),
        (["out=x", "source=text", "input=[texts]", "tokenizer=file", "tokenizer.path=none.json"], ["none.json"]),
        (["out=texts", "source=text", "input=[texts]", "tokenizer=bytes"], ["out=texts"]),
        (["out=texts/0.txt/x", "source=text", "input=[texts]", "tokenizer=bytes"], ["out=texts/0.txt/x", "cannot be written"]),
        (["out=/proc/x", "source=text", "input=[texts]", "tokenizer=bytes"], ["out=/proc/x"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_building_shards(place: Place, arguments: list[str], words: list[str]) -> None:
    said = answer([*BUILD, *arguments], cwd=place.folder)
    for word in words:
        assert word in said
    assert not (place.folder / "x").exists()
