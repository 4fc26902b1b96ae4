"""Promise: a run folder holds the settings of one model on one stream of data, checked before any process starts."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mtp_dist.config.compose import compose, load, save
from mtp_dist.config.schema import ParallelConfig, Plan, ShardBuild, TokenizerConfig, TrainingRun
from mtp_dist.data.building import build
from mtp_dist.errors import UserError
from mtp_dist.freezing import (
    changes,
    check,
    continued,
    continued_as,
    freeze,
    frozen,
    prepare,
    resolved_file,
    under_launcher,
)

Composer = Callable[..., TrainingRun]
RANK = {"RANK": "0", "MTP_DIST_PARENT": "0"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezing")
    for number in range(20):
        (folder / f"{number}.txt").write_text("the quick brown fox " * 10)
    out = folder / "set"
    build(ShardBuild(source="text", input=[str(folder)], out=str(out), tokenizer=TokenizerConfig(kind="bytes"), workers=1))
    return out


@pytest.fixture
def composed(dataset: Path, tmp_path: Path) -> Composer:
    def make(*overrides: str) -> TrainingRun:
        places = [f"run_dir={tmp_path / 'run'}", f"data.path={dataset}"]
        return compose("train", TrainingRun, [*places, "train.steps=50", *overrides])

    return make


def files(config: TrainingRun) -> list[str]:
    return sorted(path.name for path in Path(config.run_dir).iterdir())


def refusal(config: TrainingRun) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_frozen_is_what_every_process_reads(composed: Composer, dataset: Path) -> None:
    prepared = prepare(composed())
    vocabulary = json.loads((dataset / "dataset.json").read_text())["tokenizer"]["vocab_size"]
    assert prepared.model.vocab_size == vocabulary
    assert (prepared.model.head_dim, prepared.launch.processes_per_node) == (32, 1)
    assert load(resolved_file(prepared.run_dir), TrainingRun) == prepared
    assert frozen([f"run_dir={prepared.run_dir}"], RANK | {"WORLD_SIZE": "1"}) == prepared


def test_a_frozen_trunk_must_have_been_trained(composed: Composer) -> None:
    assert "init.checkpoint" in refusal(composed("mtp.freeze_trunk=true"))


def test_a_tokenizer_file_must_be_named(composed: Composer) -> None:
    assert "tokenizer.path" in refusal(composed("tokenizer.kind=file"))


def test_a_setting_that_is_no_more_is_passed_over(composed: Composer) -> None:
    prepared = prepare(composed())
    path = resolved_file(prepared.run_dir)
    path.write_text(path.read_text().replace("parallel:\n", "parallel:\n  tail_cost: null\n"))
    assert "tail_cost" in path.read_text()
    assert load(path, TrainingRun) == prepared


def test_the_same_settings_again_leave_the_file_alone(composed: Composer) -> None:
    config = prepare(composed())
    before = resolved_file(config.run_dir).stat()
    assert prepare(composed()) == config
    after = resolved_file(config.run_dir).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert files(config) == ["resolved.yaml"]


def test_changed_settings_replace_the_file_and_keep_the_earlier_ones(composed: Composer) -> None:
    prepare(composed())
    prepare(composed("train.steps=60", "parallel=v2", "mtp.loss_weight=0.1", "optim.lr=0.5"))
    last = prepare(composed("train.steps=70", "train.micro_batch=2", "train.log_every_steps=5"))
    assert files(last) == ["resolved.1.yaml", "resolved.2.yaml", "resolved.yaml"]
    steps = [load(Path(last.run_dir) / name, TrainingRun).train.steps for name in files(last)]
    assert steps == [50, 60, 70]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.layers=5", ["model.layers=5", "model.layers=4"]),
        ("model.vocab_size=300", ["model.vocab_size=300"]),
        ("mtp.depth=1", ["mtp.depth=1", "mtp.depth=2"]),
        ("mtp.concat=hidden_first", ["mtp.concat=hidden_first", "mtp.concat=embedding_first"]),
        ("seed=1", ["seed=1", "seed=1234"]),
        ("data.lanes=4", ["data.lanes=4", "data.lanes=8"]),
        ("data.block_samples=3", ["data.block_samples=3"]),
        ("train.global_batch=64", ["train.global_batch=64", "train.global_batch=32"]),
        ("train.sequence_length=64", ["train.sequence_length=64", "train.sequence_length=256"]),
    ],
)
def test_another_model_or_another_stream_needs_another_folder(composed: Composer, override: str, words: list[str]) -> None:
    config = prepare(composed())
    before = resolved_file(config.run_dir).read_bytes()
    message = refusal(composed(override, "train.steps=60"))
    for word in [*words, config.run_dir, "new run_dir"]:
        assert word in message
    assert resolved_file(config.run_dir).read_bytes() == before
    assert files(config) == ["resolved.yaml"]


def test_other_data_needs_another_folder_but_moved_data_does_not(composed: Composer, dataset: Path, tmp_path: Path) -> None:
    prepare(composed())
    link = tmp_path / "link"
    link.symlink_to(dataset)
    prepare(composed(f"data.path={link}"))
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    assert "data.path" in refusal(composed(f"data.path={copy}"))
    moved = prepare(composed(f"data.path={copy}", f"run_dir={tmp_path / 'other'}"))
    copy.rename(tmp_path / "moved")
    again = prepare(composed(f"data.path={tmp_path / 'moved'}", f"run_dir={moved.run_dir}"))
    assert load(resolved_file(again.run_dir), TrainingRun).data.path == str(tmp_path / "moved")


def test_a_missing_dataset_and_a_wrong_tokenizer_are_named(composed: Composer, dataset: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal(composed(f"data.path={tmp_path / 'nothing'}"))
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    message = refusal(composed(f"tokenizer.path={other}"))
    for word in [str(other), str(dataset), "sha256", "leave tokenizer.path empty"]:
        assert word in message
    assert "does not exist" in refusal(composed(f"tokenizer.path={tmp_path / 'none.json'}"))
    prepare(composed(f"tokenizer.path={next(dataset.glob('*tokenizer*.json'))}"))


def test_the_file_that_a_dataset_was_built_with_is_its_tokenizer(composed: Composer, tmp_path: Path, dataset: Path) -> None:
    """The dataset keeps it in the library's own format; the file that was named keeps its."""
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(json.loads(next(dataset.glob("*tokenizer*.json")).read_text()), indent=7))
    tokenizer = TokenizerConfig("file", str(mine))
    out = tmp_path / "set"
    build(ShardBuild(source="text", input=[str(dataset.parent / "*.txt")], out=str(out), tokenizer=tokenizer, workers=1))
    assert (out / "tokenizer.json").read_bytes() != mine.read_bytes()
    typed = ("tokenizer.kind=file", f"tokenizer.path={mine}")
    prepare(composed(f"data.path={out}", *typed))
    mine.write_text(mine.read_text().replace("7", "8"))
    assert "is not the tokenizer that made" in refusal(composed(f"data.path={out}", *typed))


def test_a_run_names_the_end_of_a_document_that_its_dataset_has(composed: Composer) -> None:
    assert prepare(composed()).tokenizer.eos_token == "<|endoftext|>"
    prepare(composed("tokenizer.eos_token='<|endoftext|>'"))
    message = refusal(composed("tokenizer.eos_token='</s>'"))
    assert "tokenizer.eos_token=</s>" in message and "was built with <|endoftext|>; leave it out" in message


def test_a_run_of_an_earlier_version_goes_on_without_a_name(composed: Composer) -> None:
    """Its decoder looks for the known names, as it did; its settings have not changed."""
    frozen_before = prepare(composed())
    frozen_before.tokenizer.eos_token = ""
    save(frozen_before, resolved_file(frozen_before.run_dir))
    names = files(frozen_before)
    assert prepare(composed()).tokenizer.eos_token == ""
    assert files(frozen_before) == names


def test_a_layout_that_does_not_fit_leaves_no_folder(composed: Composer, tmp_path: Path) -> None:
    assert "parallel.tensor=3" in refusal(composed("parallel.tensor=3"))
    # The byte tokenizer's number of entries is known only from the dataset.
    assert "257" in refusal(composed("model.vocab_size=256"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(composed: Composer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run_dir" in refusal(composed(f"run_dir={tmp_path / 'file' / 'run'}"))


def test_only_the_first_of_several_nodes_writes_and_each_keeps_its_own_rank(composed: Composer, tmp_path: Path) -> None:
    nodes = ["parallel.data=2", "launch.nodes=2"]
    second = prepare(composed(*nodes, "launch.node_rank=1"))
    assert second.launch.node_rank == 1
    assert not (tmp_path / "run").exists()
    first = prepare(composed(*nodes))
    assert prepare(composed(*nodes, "launch.node_rank=1")) == replace(first, launch=replace(first.launch, node_rank=1))
    assert files(first) == ["resolved.yaml"]


@pytest.mark.parametrize("argv", [[], ["train.steps=3"], ["run_dir=x", "train.steps=3"], ["run_dir="]])
def test_a_process_of_a_job_takes_only_the_run_folder(argv: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        frozen(argv, RANK)
    for word in ["only run_dir=FOLDER", "python -m mtp_dist.train", *argv]:
        assert word in str(caught.value)


def test_a_run_that_was_not_prepared_and_a_wrong_number_of_processes_are_named(composed: Composer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resolved\.yaml does not exist; run `python -m mtp_dist\.train"):
        frozen([f"run_dir={tmp_path}"], RANK)
    config = prepare(composed("parallel=v2"))
    with pytest.raises(UserError, match=r"WORLD_SIZE=3 .* 2 x 1 x 1 = 2"):
        frozen([f"run_dir={config.run_dir}"], RANK | {"WORLD_SIZE": "3"})
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS=3"):
        frozen([f"run_dir={config.run_dir}"], {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3"})


def test_a_moved_run_folder_reads_as_where_it_is(composed: Composer, tmp_path: Path) -> None:
    config = prepare(composed())
    Path(config.run_dir).rename(tmp_path / "moved")
    assert frozen([f"run_dir={tmp_path / 'moved'}"], RANK).run_dir == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, False),
        ({"RANK": "3", "MTP_DIST_PARENT": "4711"}, True),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "somebody's torchrun"},
            True,
        ),
        # What an operator of a cluster sets in each of its containers.
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456", "PET_NNODES": "4"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4"}, True),
        # srun --pty bash: settings are composed there as on a laptop.
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # One task a node, each of which starts torchrun.
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", **RANK}, True),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, False),
    ],
)
def test_what_srun_and_torchrun_start_is_a_process_of_the_job_and_a_batch_script_is_not(
    environment: dict[str, str], answer: bool
) -> None:
    assert under_launcher(environment) is answer


@pytest.mark.parametrize("length", ["train.steps=50", "train.steps=null train.tokens=100000"])
def test_the_run_folder_alone_continues_a_run_with_its_own_settings(composed: Composer, length: str) -> None:
    config = prepare(composed(*length.split(), "optim.lr=0.25", "schedule=wsd"))
    same = continued([f"run_dir={config.run_dir}"])
    assert same is not None
    assert prepare(same) == config
    assert files(config) == ["resolved.yaml"]
    assert continued(["run_dir=does/not/exist"]) is None


def again(config: TrainingRun, *words: str) -> TrainingRun:
    found = continued([f"run_dir={config.run_dir}", *words])
    assert found is not None
    return check(found)


def test_typed_settings_lie_over_the_frozen_ones(composed: Composer) -> None:
    words = ["optim.lr=0.005", "parallel=v2", "parallel.timeout_minutes=3", "train.micro_batch=2", "schedule.warmup_tokens=99"]
    config = prepare(composed(*words))
    lower = again(config, "optim.lr=0.001")
    assert lower == replace(config, optim=replace(config.optim, lr=0.001))
    assert changes(lower) == ["changed: optim.lr 0.005 -> 0.001"]
    # A group stands for what its options set, and nothing else.
    replicas = again(config, "parallel=data2", "schedule=constant")
    assert replicas.parallel == replace(config.parallel, pipeline=1, data=2, schedule=ParallelConfig().schedule)
    assert replicas.schedule == replace(config.schedule, kind="constant")
    assert (replicas.train, replicas.optim) == (config.train, config.optim)
    assert [line.split()[1] for line in changes(replicas)] == ["parallel.pipeline", "parallel.data", "schedule.kind"]
    alone = again(config, "parallel=single", "parallel.timeout_minutes=4")
    assert (alone.launch.processes_per_node, alone.parallel.timeout_minutes, alone.parallel.pipeline) == (1, 4, 1)
    assert files(config) == ["resolved.yaml"]


def test_the_length_of_a_run_is_the_one_that_was_typed_last(composed: Composer) -> None:
    config = prepare(composed("schedule=wsd"))
    tokens = config.train.steps * config.train.global_batch * config.train.sequence_length  # type: ignore[operator]
    longer = again(config, f"train.tokens={2 * tokens}")
    assert (longer.train.steps, longer.train.tokens) == (100, 2 * tokens)
    assert longer.schedule.decay_tokens == 2 * tokens // 5, "derived again"
    freeze(longer)
    assert again(config, "optim.lr=0.1").train == longer.train
    shorter = again(config, "train.steps=60")
    assert (shorter.train.steps, shorter.train.tokens) == (60, None)
    kept = again(config, "train.steps=60", "schedule.decay_tokens=4096")
    assert again(kept, "train.steps=70").schedule.decay_tokens != kept.schedule.decay_tokens
    freeze(kept)
    assert again(kept, "train.steps=70").schedule.decay_tokens == 4096, "typed once, it stays"


def test_an_experiment_typed_again_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    """As launch/quickstart.sh does: the same command twice."""
    words = ["experiment=quickstart", f"run_dir={tmp_path / 'run'}", f"data.path={dataset}", "train.micro_batch=2"]
    config = prepare(compose("train", TrainingRun, words))
    same = continued(words)
    assert same is not None
    assert check(same) == config
    assert changes(check(same)) == []
    # What its file does not set keeps the run's value.
    fewer = continued(words[:-1])
    assert fewer is not None
    assert changes(check(fewer)) == ["changed: train.micro_batch 2 -> 8"]
    prepared = prepare(again(config, "parallel.timeout_minutes=2", "optim.beta2=0.9"))
    kept = continued(words)
    assert kept is not None
    assert (kept.parallel.timeout_minutes, kept.optim.beta2) == (2, 0.9)
    assert check(kept) == prepared


def test_a_trunk_that_made_room_for_its_heads_makes_room_once(composed: Composer) -> None:
    words = ["mtp=gloeckle_n4", "mtp.match_parameters=true", "model.layers=9", "parallel=v2"]
    config = prepare(composed(*words))
    assert config.model.layers < 9
    for same in (words, ["mtp.match_parameters=true", "model.layers=9"], ["optim.lr=0.001"]):
        assert again(config, *same).model.layers == config.model.layers


@pytest.mark.parametrize("typed", ["model=small", "model.layers=5", "seed=7", "data.lanes=4", "mtp=none", "mtp.depth=1"])
def test_what_may_not_change_is_refused_by_name(composed: Composer, typed: str) -> None:
    config = prepare(composed())
    with pytest.raises(UserError) as caught:
        again(config, typed)
    assert typed.partition("=")[0] in str(caught.value)
    assert "new run_dir" in str(caught.value)


def test_other_commands_lay_typed_settings_over_a_run_as_well(composed: Composer, tmp_path: Path) -> None:
    config = prepare(composed("optim.lr=0.25", "parallel=v2"))
    plan = continued_as(Plan, "plan", [f"run_dir={config.run_dir}", "world_memory_gib=3", "parallel=data2"])
    assert plan is not None
    assert (plan.world_memory_gib, plan.optim.lr, plan.parallel.data, plan.parallel.pipeline) == (3, 0.25, 2, 1)
    assert continued_as(Plan, "plan", ["world_memory_gib=3", "parallel=data2"]) is None
    done = subprocess.run(
        [sys.executable, "-m", "mtp_dist.freezing", f"run_dir={config.run_dir}", "optim.lr=0.125"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[0] == "changed: optim.lr 0.25 -> 0.125", done.stderr
    assert load(resolved_file(config.run_dir), TrainingRun).optim.lr == 0.125


def test_a_mistyped_run_folder_is_named_beside_the_data_that_it_lacks(composed: Composer) -> None:
    """Whoever means to go on with a run types its folder alone, and no data."""
    wrong = compose("train", TrainingRun, ["run_dir=runs/qickstart"])
    said = refusal(wrong)
    assert "data.path is empty" in said and "run_dir=runs/qickstart has no resolved.yaml" in said and "run_dir of a run" in said
    started = prepare(composed())
    there = continued([f"run_dir={started.run_dir}", "train.steps=60"])
    assert there is not None and there.data.path == started.data.path


def test_another_node_continues_a_run_with_its_own_place(composed: Composer) -> None:
    config = prepare(composed("parallel.data=2", "launch.nodes=2", "launch.master_addr=10.0.0.1", "optim.lr=0.25"))
    again = continued([f"run_dir={config.run_dir}", "launch.node_rank=1"])
    assert again is not None
    assert prepare(again) == replace(config, launch=replace(config.launch, node_rank=1))
    assert files(config) == ["resolved.yaml"]
    moved = continued([f"run_dir={config.run_dir}", "launch.master_addr=10.0.0.2", "launch.master_port=4000"])
    assert moved is not None
    assert prepare(moved) == replace(config, launch=replace(config.launch, master_addr="10.0.0.2", master_port=4000))
    together = continued([f"run_dir={config.run_dir}", "launch.nodes=1"])
    assert together is not None
    assert prepare(together).launch.processes_per_node == 2
    with pytest.raises(UserError, match=r"launch\.node_rnk is not a setting .* launch\.node_rank"):
        continued([f"run_dir={config.run_dir}", "launch.node_rnk=1"])
    with pytest.raises(UserError, match=r"launch\.node_rank takes int"):
        continued([f"run_dir={config.run_dir}", "launch.node_rank=one"])


def test_the_settings_are_there_at_every_moment(composed: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the folder as it was; while the new settings are written, the old ones can be read."""
    config = prepare(composed())
    before = resolved_file(config.run_dir).read_bytes()
    real = os.replace

    def full_disk(source: str, target: str) -> None:
        assert resolved_file(config.run_dir).read_bytes() == before
        os.unlink(source)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full_disk)
    message = refusal(composed("train.steps=60"))
    assert "run_dir=" in message and os.strerror(errno.ENOSPC) in message
    assert files(config) == ["resolved.yaml"]
    assert resolved_file(config.run_dir).read_bytes() == before
    monkeypatch.setattr(os, "replace", real)
    prepare(composed("train.steps=60"))
    assert files(config) == ["resolved.1.yaml", "resolved.yaml"]


def test_a_check_refuses_what_preparing_refuses_and_writes_nothing(composed: Composer, tmp_path: Path) -> None:
    checked = check(composed())
    assert not (tmp_path / "run").exists()
    assert prepare(composed()) == checked
    for asked in (composed("model.layers=5"), composed("tokenizer.path=nowhere.json")):
        with pytest.raises(UserError) as caught:
            check(asked)
        assert str(caught.value) == refusal(asked)
    check(composed("train.steps=70"))
    assert files(checked) == ["resolved.yaml"]


def test_threads_stay_from_start_to_start_whatever_the_machine_has(
    composed: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = check(composed("parallel=v2"), cores=12)
    assert first.launch.threads == 6
    freeze(first)
    assert check(composed("parallel=v2"), cores=64) == first
    assert prepare(composed("parallel=v2")) == first
    again = continued([f"run_dir={first.run_dir}"])
    assert again is not None
    assert check(again, cores=64) == first
    assert files(first) == ["resolved.yaml"]
    # Asked for, or with another number of processes on a node, it is another number.
    assert check(composed("parallel=v2", "launch.threads=3"), cores=12).launch.threads == 3
    assert check(composed("parallel=v2_data2"), cores=12).launch.threads == 3
    assert check(composed("parallel=v2", "train.deterministic=false"), cores=12).launch.threads == 0


def test_threads_of_nodes_that_are_not_known_yet_are_the_cores_asked_for(composed: Composer) -> None:
    assert check(composed("launch.cpus_per_task=7"), cores=0).launch.threads == 7
    assert check(composed(), cores=0).launch.threads == 0
