"""A run's settings, frozen: checked once, written to ``<run_dir>/resolved.yaml``, and read by every process.

``check`` and ``freeze`` (together ``prepare``) are the steps that all launchers share; they run in one process, before any other
starts. ``frozen`` is what a process of the job calls. Nothing here imports torch, so bad input is answered at once.
``python -m mtp_dist.freezing key=value ...`` does nothing else, for a job whose processes srun will start.

A run folder belongs to one model on one stream of data; a changed setting that makes another of either is refused (``IDENTITY``).
Any other setting may change from one start to the next; the earlier file stays as ``resolved.<n>.yaml``.
"""

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from mtp_dist.checkpoint import draft_tokens, folder
from mtp_dist.checkpoint.compatibility import require_same_model, require_start
from mtp_dist.checkpoint.manifest import TOKENIZER, read_manifest
from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.compose import chosen, compose, differences, load, overlaid, save, value
from mtp_dist.config.layout import processes_per_node, world_size
from mtp_dist.config.resolution import decay_tokens, resolve
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.config.validation import validate
from mtp_dist.data.dataset import Dataset, file_sha256
from mtp_dist.errors import UserError
from mtp_dist.launching import available_cores, threads_of_each
from mtp_dist.rank_environment import is_torch_rank
from mtp_dist.run_lock import held
from mtp_dist.slurm_step import is_task

# A trailing dot stands for the whole group.
IDENTITY = (
    "seed",
    "model.",
    "mtp.",
    "init.",
    "tokenizer.path",
    "data.path",
    "data.lanes",
    "data.block_samples",
    "data.mix_tokens",
    "train.sequence_length",
    "train.global_batch",
)
# How losses are weighted and whether the trunk learns is training policy: it changes neither the parameters nor the rows that are
# read. How model.vocab_size was found does not matter once it is.
NOT_IDENTITY = (
    "model.vocab_multiple",
    "mtp.targets",
    "mtp.main_loss_weight",
    "mtp.main_loss_weight_points",
    "mtp.scheduled_sampling",
    "mtp.scheduled_sampling_points",
    "mtp.scheduled_sampling_shape",
    "mtp.loss_weight",
    "mtp.loss_weight_points",
    "mtp.loss_weight_shape",
    "mtp.curriculum",
    "mtp.normalize",
    "mtp.depth_weights",
    "mtp.decay",
    "mtp.cross_entropy_weight",
    "mtp.detach",
    "mtp.freeze_trunk",
)
PATHS = ("data.path", "tokenizer.path", "init.checkpoint")
Run = TypeVar("Run", bound=TrainingRun)


def resolved_file(run_dir: str | os.PathLike[str]) -> Path:
    """Where a run's frozen settings are."""
    return Path(run_dir) / "resolved.yaml"


def prepare(config: TrainingRun) -> TrainingRun:
    """``check`` and, on the first node, ``freeze``; returns the checked settings.

    Of several nodes only the first writes (the others wait for it in the rendezvous), so the file says ``launch.node_rank: 0``
    and the returned configuration says this node's. Raises UserError.
    """
    full = check(config)
    if full.launch.node_rank == 0:
        freeze(full)
    return full


def check(config: TrainingRun, cores: int | None = None) -> TrainingRun:
    """Check a composed configuration, its dataset, the run's newest checkpoint and its frozen settings (if there are any), and
    return the configuration with derived settings filled. Writes nothing. Raises UserError.

    ``cores``: CPU cores that the processes of one node will share; None: those of this machine; 0: not known.
    """
    versions.check()
    if config.run_dir and not config.data.path and _frozen_before(config.run_dir) is None:
        raise UserError(
            f"data.path is empty, and run_dir={config.run_dir} has no resolved.yaml of a run to go on with; "
            "give data.path=FOLDER (made by data/build_shards.py), or the run_dir of a run"
        )
    validate(config, None)
    dataset = _dataset(config)
    validate(config, dataset.vocab_size)
    full = resolve(config, dataset.vocab_size)
    # Before anything is written: settings of another model, once frozen, would refuse the right ones.
    for checkpoint in folder.complete(Path(full.run_dir) / "checkpoints")[-1:]:
        require_same_model(checkpoint, full)
    old = _frozen_before(full.run_dir)
    full.init.checkpoint = _start(full, dataset, old)
    full.tokenizer.eos_token = _eos_token(full, dataset, old)
    if full.mtp.freeze_trunk and not full.init.checkpoint and not folder.complete(Path(full.run_dir) / "checkpoints"):
        raise UserError(
            "mtp.freeze_trunk=true would keep a trunk of random weights; give a trained one by "
            "init.checkpoint=RUN_FOLDER, or set mtp.freeze_trunk=false"
        )
    if full.train.deterministic:
        full.launch.threads = _threads(full, old, available_cores() if cores is None else cores)
    if old is not None:
        _changes(old, full)
    return full


def freeze(config: TrainingRun) -> Path:
    """Write ``resolved.yaml`` unless the same is there; keep one that differs, refuse one of another model or data. Before it
    the tokens that the heads draft among, where the settings ask for some."""
    path = resolved_file(config.run_dir)
    old = _frozen_before(config.run_dir)
    changes = _changes(old, config) if old is not None else []
    try:
        draft_tokens.choose(config)
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from None
    if old is not None and not changes:
        return path
    kept = None
    try:
        if old is not None:
            # A copy, so that at no moment the run is without its settings.
            kept = Path(shutil.copyfile(path, _next_name(path)))
        save(config, path)
    except OSError as error:
        if kept is not None:
            kept.unlink(missing_ok=True)
        raise UserError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from None
    return path


def under_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one process of a job that torchrun or srun started."""
    return is_torch_rank(environment) or is_task(environment)


def frozen(argv: list[str], environment: Mapping[str, str] = os.environ) -> TrainingRun:
    """The frozen settings, in a process of the job: ``argv`` is ``run_dir=FOLDER`` and nothing else. Raises UserError."""
    run_dir = _only_run_dir(argv)
    if run_dir is None:
        typed = " ".join(argv)
        raise UserError(
            f"under torchrun and srun mtp_dist.train takes only run_dir=FOLDER, not {typed!r}; settings are frozen before: "
            f"run `python -m mtp_dist.train {typed or 'run_dir=FOLDER key=value'}` without torchrun (it starts torchrun itself)"
        )
    path = resolved_file(run_dir)
    if not path.exists():
        command = f"python -m mtp_dist.train run_dir={run_dir} key=value"
        raise UserError(f"{path} does not exist; run `{command}` without torchrun first")
    config = load(path, TrainingRun)
    # The folder may have been moved since.
    config.run_dir = run_dir
    check_world(config.parallel, path, environment)
    return config


def continued(argv: list[str]) -> TrainingRun | None:
    """A run that exists, with the typed settings laid over its frozen ones; None where the folder that ``argv`` names holds no
    run.

    Whatever was not typed keeps the run's value, not the default (``compose.chosen`` says what counts as typed); settings that
    were derived from others are derived again. Raises UserError for a setting that does not exist or takes no such value.
    """
    if not any(word.startswith(("run_dir=", "experiment=")) for word in argv):
        return None
    typed = compose("train", TrainingRun, argv)
    old = _frozen_before(typed.run_dir) if typed.run_dir else None
    if old is None:
        return None
    keys = chosen("train", TrainingRun, argv)
    if typed.mtp.match_parameters and "mtp.match_parameters" in keys:
        # The frozen trunk is what was left; the blocks are taken out of the whole one.
        keys.add("model.layers")
    config = overlaid(old, typed, keys)
    config.run_dir = typed.run_dir
    _derive_again(config, old, keys)
    return config


def continued_as(schema: type[Run], config_name: str, argv: list[str]) -> Run | None:
    """``continued`` for a command whose settings are those of a training run and some of its own."""
    run_settings = {field.name for field in fields(TrainingRun)}
    own = [field.name for field in fields(schema) if field.name not in run_settings]
    typed = [word for word in argv if word.partition("=")[0] in own]
    run = continued([word for word in argv if word not in typed])
    if run is None:
        return None
    extra = compose(config_name, schema, typed)
    return schema(**{name: getattr(run, name) for name in run_settings}, **{name: getattr(extra, name) for name in own})


def _derive_again(config: TrainingRun, old: TrainingRun, keys: Collection[str]) -> None:
    """Leave open, in place, what ``resolve`` and ``check`` derive, unless it was typed."""
    if "train.steps" not in keys and (config.train.tokens is not None or "train.tokens" in keys):
        config.train.steps = None
    elif "train.steps" in keys and "train.tokens" not in keys:
        config.train.tokens = None
    if "schedule.decay_tokens" not in keys and old.train.steps and decay_tokens(old) == old.schedule.decay_tokens:
        config.schedule.decay_tokens = None
    if "launch.nodes" in keys or any(key.startswith("parallel.") for key in keys):
        if "launch.processes_per_node" not in keys:
            config.launch.processes_per_node = None
        if "launch.threads" not in keys and processes_per_node(config) != old.launch.processes_per_node:
            config.launch.threads = 0


def changes(config: TrainingRun) -> list[str]:
    """What a checked configuration changes in its run, a line each: ``changed: optim.lr 0.005 -> 0.001``. None on other nodes
    than the first, whose settings are the run's. Raises UserError where it makes another model or stream of data."""
    old = _frozen_before(config.run_dir)
    if old is None or config.launch.node_rank != 0:
        return []
    return [f"changed: {key} {_shown(value(old, key))} -> {_shown(value(config, key))}" for key in _changes(old, config)]


def check_world(parallel: ParallelConfig, settings: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError unless as many processes were started as the frozen file ``settings`` asks for."""
    name = "WORLD_SIZE" if is_torch_rank(environment) else "SLURM_STEP_NUM_TASKS"
    started, needed = environment.get(name), world_size(parallel)
    if started is not None and started != str(needed):
        raise UserError(
            f"{name}={started} processes were started, but {settings} says parallel.pipeline x data x "
            f"tensor = {parallel.pipeline} x {parallel.data} x {parallel.tensor} = {needed}; start {needed}"
        )


def _only_run_dir(argv: list[str]) -> str | None:
    if len(argv) != 1 or not argv[0].startswith("run_dir="):
        return None
    return argv[0].removeprefix("run_dir=") or None


def _dataset(config: TrainingRun) -> Dataset:
    """The dataset, complete, and made by the tokenizer that was given (if one was). Raises UserError."""
    try:
        dataset = Dataset.open(config.data.path)
        dataset.split("train")
    except UserError as error:
        raise UserError(f"data.path={config.data.path}: {error}") from None
    if config.tokenizer.kind == "file" and not config.tokenizer.path:
        raise UserError("tokenizer.kind=file without tokenizer.path; give the file, or leave out both for the dataset's own")
    if config.tokenizer.path:
        path = Path(config.tokenizer.path)
        if not path.is_file():
            raise UserError(f"tokenizer.path={path} does not exist; leave it empty to take the dataset's own")
        if (found := file_sha256(path)) not in (dataset.tokenizer_sha256, dataset.given_tokenizer_sha256):
            raise UserError(
                f"tokenizer.path={path} (sha256 {found[:12]}) is not the tokenizer that made data.path={config.data.path} "
                f"(sha256 {dataset.tokenizer_sha256[:12]}); leave tokenizer.path empty to take the dataset's own"
            )
    return dataset


def _eos_token(config: TrainingRun, dataset: Dataset, old: TrainingRun | None) -> str:
    """The end-of-document token as the run names it: the dataset's, or what its frozen settings say (nothing, where an earlier
    version froze them). Raises UserError where another one was given."""
    if config.tokenizer.eos_token not in ("", dataset.eos_token):
        raise UserError(
            f"tokenizer.eos_token={config.tokenizer.eos_token}, but data.path={config.data.path} was built with "
            f"{dataset.eos_token}; leave it out to take the dataset's own"
        )
    return dataset.eos_token if old is None else old.tokenizer.eos_token


def _start(config: TrainingRun, dataset: Dataset, old: TrainingRun | None) -> str:
    """The one checkpoint that ``init.checkpoint`` means, the same at every start of the run. Raises UserError where it does not
    fit."""
    given = config.init.checkpoint
    if not given:
        return ""
    if old is not None and old.init.checkpoint:
        before = Path(os.path.realpath(old.init.checkpoint))
        if Path(os.path.realpath(given)) in (before, *before.parents):
            return old.init.checkpoint
    path = folder.locate(given, "init.checkpoint")[0]
    read_manifest(path)
    require_start(path, config)
    if file_sha256(path / TOKENIZER) != dataset.tokenizer_sha256:
        raise UserError(
            f"init.checkpoint={path} was trained with another tokenizer than the one that made data.path={config.data.path}; "
            f"build the shards with tokenizer.kind=file tokenizer.path={path / TOKENIZER}"
        )
    return str(path.resolve())


def _frozen_before(run_dir: str) -> TrainingRun | None:
    path = resolved_file(run_dir)
    try:
        return load(path, TrainingRun) if path.exists() else None
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be read: {error.strerror}") from None


def _changes(old: TrainingRun, new: TrainingRun) -> list[str]:
    """Settings that differ from the frozen ones. Raises UserError where one makes another model or another stream of data."""
    found = []
    for key, was, now in differences(old, new):
        if _same_place(key, was, now):
            continue
        if _is_identity(key) and not _moved(key, was):
            raise UserError(
                f"{key}={_shown(now)}, but the run in {new.run_dir} has {key}={_shown(was)}; "
                f"choose a new run_dir, or keep {key}={_shown(was)}"
            )
        found.append(key)
    return found


def _threads(config: TrainingRun, old: TrainingRun | None, cores: int) -> int:
    """``launch.threads`` as a number that stays the same from start to start: sums depend on it. 0 where it cannot be known."""
    if config.launch.threads:
        return config.launch.threads
    if old is not None and old.launch.threads and old.launch.processes_per_node == config.launch.processes_per_node:
        return old.launch.threads
    return threads_of_each(config, cores, os.environ) if cores else config.launch.cpus_per_task or 0


def _is_identity(key: str) -> bool:
    if key in NOT_IDENTITY:
        return False
    return any(key.startswith(name) if name.endswith(".") else key == name for name in IDENTITY)


def _same_place(key: str, old: Any, new: Any) -> bool:
    """Two spellings of one path are no difference."""
    return key in (*PATHS, "run_dir") and bool(old) and bool(new) and os.path.realpath(old) == os.path.realpath(new)


def _moved(key: str, old: str) -> bool:
    """The dataset lies elsewhere now; a checkpoint's data position is only restored where its content is the same."""
    return key == "data.path" and not os.path.exists(old)


def _next_name(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return kept


def _shown(item: Any) -> str:
    return "null" if item is None else str(item).replace(" ", "")




def run(config: TrainingRun) -> None:
    """The command: freeze, start nothing."""
    # The cores are those of other machines.
    full = check(config, cores=0)
    with held(full.run_dir):
        for line in changes(full):
            print(line)
        print(f"settings frozen in {freeze(full)}")


if __name__ == "__main__":
    application(
        "train",
        TrainingRun,
        run,
        shortcut=continued,
        command="python -m mtp_dist.freezing",
        examples=[
            "python -m mtp_dist.freezing run_dir=runs/one data.path=datasets/mine parallel.data=4 train.steps=9 launch.threads=8",
            "srun --ntasks=4 --cpus-per-task=8 python -m mtp_dist.train run_dir=runs/one",
        ],
    )
