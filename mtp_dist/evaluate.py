"""Held-out loss of a checkpoint: ``python -m mtp_dist.evaluate checkpoint=runs/one parallel=v2``.

Model, heads and dataset are the checkpoint's; the layout is chosen anew, and any layout gives the same numbers up to rounding.
Started by hand it checks everything that needs no weights, freezes the settings beside the result, and starts torchrun on this
machine; a world of one process runs in place. Under torchrun, or as one of several tasks of srun, it is one process of the job:
it takes ``settings=FROZEN_FILE`` alone. The result is a table and a JSON file: by default in ``evaluation/`` of the run folder,
where the name depends on what is evaluated, or ``output=``.
"""

import copy
import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_dist import decode_report, humaneval
from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.manifest import TOKENIZER
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config import versions
from mtp_dist.config.command import application, open_output, shown
from mtp_dist.config.compose import differences, load, save
from mtp_dist.config.heads import lookahead
from mtp_dist.config.layout import fewest_micro_batches, world_size
from mtp_dist.config.rules import alternatives, at_least, one_of
from mtp_dist.config.schema import Evaluation, ParallelConfig, TrainingRun
from mtp_dist.config.validation import validate_launch, validate_parallel, validate_sequence_parallel
from mtp_dist.data.dataset import Dataset, file_sha256
from mtp_dist.data.packing import full_rows, row_length
from mtp_dist.errors import UserError
from mtp_dist.freezing import check_world, under_launcher
from mtp_dist.launching import stand_alone, start_module
from mtp_dist.parent_process import end_rank_with_parent
from mtp_dist.quantity import counted
from mtp_dist.slurm_step import adopt
from mtp_dist.standard_streams import say
from mtp_dist.training.signals import end_at_once

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.parallel.mesh import Mesh
    from mtp_dist.training.statistics import Totals

MODULE = "mtp_dist.evaluate"
EXAMPLES = (
    f"python -m {MODULE} checkpoint=runs/quickstart",
    f"python -m {MODULE} checkpoint=runs/quickstart/checkpoints/step_00000200 parallel=v2 dtype=float32",
    f"python -m {MODULE} checkpoint=runs/quickstart data=datasets/other sequences=1000 output=other.json",
    f"python -m {MODULE} checkpoint=runs/quickstart task=decode file=prompts.jsonl decode.draft=4",
    f"python -m {MODULE} checkpoint=runs/code task=humaneval file=HumanEval.jsonl.gz programs.allow=true decode=sampling "
    "programs.samples=20 programs.k=[1,10]",
)
# Micro-batches of one pass for each pipeline rank: enough that filling and draining the pipeline is a small share.
MICRO_BATCHES_A_RANK = 4
NOT_HELD_OUT = ("launch", "output", "task", "file", "files", "temperatures", "seed", "programs", "decode")
"""Settings that change nothing in the held-out loss."""
TASKS = ("held_out", "humaneval", "decode")
READ_BY = {
    "held_out": ("data", "split", "sequences", "micro_batch", "dtype"),
    "humaneval": ("file", "seed", "programs", "decode"),
    "decode": ("file", "files", "temperatures", "seed", "decode"),
}
"""Settings that not every task reads; ``programs`` and ``decode`` stand for their groups."""


def prepare(config: Evaluation) -> Evaluation:
    """Check everything that needs no weights; returns the settings with checkpoint, data, dtype and output filled.

    Raises UserError: no sound checkpoint, a layout that does not fit its model, no such rows, another tokenizer.
    """
    versions.check()
    at_least("sequences", config.sequences, 1)
    at_least("micro_batch", config.micro_batch, 1)
    checkpoint = folder.sound(config.checkpoint)
    trained = load_settings(checkpoint)
    full = copy.deepcopy(config)
    full.checkpoint = str(checkpoint.resolve())
    full.dtype = config.dtype or trained.train.dtype
    one_of("dtype", full.dtype, ["float32", "bfloat16"])
    validate_parallel(config.parallel, trained.model, None)
    validate_sequence_parallel(config.parallel, trained.train.sequence_length)
    validate_launch(config.launch, config.parallel)
    full.data = str(_dataset(config, trained, checkpoint).path.resolve())
    full.output = str(_result_file(config, full))
    return full


def _dataset(config: Evaluation, trained: TrainingRun, checkpoint: Path) -> Dataset:
    """The dataset, with the checkpoint's tokenizer and at least one row in the split."""
    path = config.data or trained.data.path
    if not Path(path).is_dir():
        origin = "" if config.data else " (where the checkpoint's training data was)"
        raise UserError(f"data={path}{origin} does not exist; give data=FOLDER (made by data/build_shards.py)")
    dataset = Dataset.open(path)
    own = file_sha256(checkpoint / TOKENIZER)
    if dataset.tokenizer_sha256 != own:
        raise UserError(
            f"data={path} was made by another tokenizer (sha256 {dataset.tokenizer_sha256[:12]}) than the checkpoint's "
            f"({own[:12]}); build it with tokenizer.kind=file tokenizer.path={checkpoint / TOKENIZER}"
        )
    one_of("split", config.split, list(dataset.splits))
    tokens, length, ahead = dataset.split(config.split).tokens, trained.train.sequence_length, lookahead(trained.mtp)
    if not full_rows(tokens, length, ahead):
        raise UserError(
            f"split={config.split} of {path} has {counted(tokens, 'token')}, fewer than one row of {row_length(length, ahead)}; "
            "choose another split, or build the dataset with a larger validation_share"
        )
    return dataset


def _result_file(config: Evaluation, full: Evaluation) -> Path:
    if config.output:
        path = Path(config.output)
        if path.is_dir() or path.suffix == ".yaml":
            raise UserError(f"output={path} must name a file for the JSON result, e.g. output={path.with_suffix('')}.json")
        return path.absolute()
    checkpoint = Path(full.checkpoint)
    if checkpoint.parent.name != "checkpoints":
        raise UserError(f"checkpoint={config.checkpoint} is not in a run folder, so the result needs a place: output=FILE.json")
    # Every node must find the same name, and evaluations of different things different ones.
    content = {key: value for key, value in asdict(full).items() if key not in NOT_HELD_OUT}
    mark = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return checkpoint.parents[1] / "evaluation" / f"{checkpoint.name}.{full.split}.{mark}.json"


def settings_file(config: Evaluation) -> Path:
    """Where the frozen settings of a prepared evaluation are: beside its result."""
    return Path(config.output).with_suffix(".yaml")


def launch(config: Evaluation) -> int:
    """Freeze the evaluation and run its processes on this machine; programs are written and run in this process."""
    one_of("task", config.task, TASKS)
    _refuse_unread(config)
    if config.task != "held_out" and world_size(config.parallel) > 1:
        raise UserError(
            f"task={config.task} decodes in one process, and this layout has {world_size(config.parallel)}; choose "
            "parallel=single, or decode in the layout with python -m mtp_dist.generate"
        )
    if config.task == "humaneval":
        return humaneval.run(config)
    if config.task == "decode":
        return decode_report.run(config)
    ready = prepare(config)
    path = settings_file(ready)
    if ready.launch.node_rank == 0:
        try:
            save(ready, path)
        except OSError as error:
            raise UserError(f"output={ready.output} cannot be written: {error.strerror}") from None
    if world_size(ready.parallel) > 1:
        return start_module(ready, MODULE, [f"settings={path}"])
    say(f"note: evaluating {ready.checkpoint} in this process")
    stand_alone(ready)
    return work(ready)


def _refuse_unread(config: Evaluation) -> None:
    """Raise UserError for a setting that is given to a task that does not read it."""
    some = {name for names in READ_BY.values() for name in names} - set(READ_BY[config.task])
    for key, given_, _ in differences(config, Evaluation()):
        if (name := key.partition(".")[0]) in some:
            readers = alternatives(f"task={task}" for task, names in READ_BY.items() if name in names)
            raise UserError(f"{key}={shown(given_)} has no effect with task={config.task}; leave it out, or choose {readers}")


def frozen(argv: list[str]) -> Evaluation:
    """The frozen settings, in a process of the job. Raises UserError."""
    if len(argv) != 1 or not argv[0].startswith("settings="):
        raise UserError(
            f"under torchrun and srun {MODULE} takes only settings=FROZEN_FILE, not {' '.join(argv)!r}; "
            f"run `python -m {MODULE} checkpoint=... key=value` without torchrun (it starts torchrun itself)"
        )
    path = Path(argv[0].removeprefix("settings="))
    config = load(path, Evaluation)
    check_world(config.parallel, path)
    return config


def work(config: Evaluation) -> int:
    """One process of the job; returns its exit status."""
    adopt(config.launch)
    import torch

    from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect

    torch.set_num_threads(config.launch.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = choose_device(config.launch.device)
    connect(device, config.parallel.timeout_minutes)
    mesh = build_mesh(config.parallel, device)
    result = measure(config, mesh)
    if mesh.rank == 0:
        print(table(result), flush=True)
        try:
            Path(config.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={config.output} cannot be written: {error.strerror}") from None
        print(f"written to {config.output}", flush=True)
    disconnect()
    return 0


def run_settings(config: Evaluation, trained: TrainingRun) -> TrainingRun:
    """The checkpoint's settings under the layout, batch and precision of a prepared evaluation."""
    assert config.dtype is not None
    run = copy.deepcopy(trained)
    run.parallel, run.launch, run.data.path = config.parallel, config.launch, config.data
    run.train.dtype, run.train.micro_batch = config.dtype, config.micro_batch
    rows = config.micro_batch * config.parallel.data
    wanted = min(-(-config.sequences // rows), MICRO_BATCHES_A_RANK * config.parallel.pipeline)
    run.train.global_batch = rows * equal_rounds(max(wanted, fewest_micro_batches(config.parallel)), config.parallel)
    return run


def equal_rounds(micro_batches: int, parallel: ParallelConfig) -> int:
    """So many micro-batches, or a few more (padding) where the interleaved schedule takes them in rounds of its ranks."""
    ranks = parallel.pipeline
    if parallel.schedule != "interleaved" or micro_batches <= ranks:
        return micro_batches
    return -(-micro_batches // ranks) * ranks


def measure(config: Evaluation, mesh: "Mesh") -> dict[str, Any]:
    """The result of a prepared evaluation, the same on every rank, ready for JSON. Collective."""
    from tqdm import tqdm

    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.config.layout import micro_batches
    from mtp_dist.training.held_out import HeldOut
    from mtp_dist.training.step import load_forward_only

    checkpoint = Checkpoint(Path(config.checkpoint))
    run = run_settings(config, checkpoint.config)
    dataset = Dataset.open(config.data)
    held_out = HeldOut(load_forward_only(run, mesh, checkpoint), dataset, config.split, config.sequences)
    # One bar for all ranks, where there is a terminal.
    with tqdm(total=held_out.count, desc="rows", unit="row", disable=None if mesh.rank == 0 else True) as bar:
        totals = held_out.run(run.train.micro_batch, micro_batches(run), lambda done: bar.update(done - bar.n) and None)
    return {
        "checkpoint": config.checkpoint,
        "step": checkpoint.step,
        "data": config.data,
        "split": config.split,
        "fingerprint": dataset.split(config.split).fingerprint,
        "rows": held_out.count,
        "sequence_length": run.train.sequence_length,
        "dtype": config.dtype,
        "parallel": asdict(config.parallel),
        "depths": depths(totals),
    }


def depths(totals: "Totals") -> list[dict[str, Any]]:
    """One entry for the main head (depth 0) and each MTP depth; a value that is not finite is None, as JSON has no word for it.

    ``loss``: nats a target; eagle: L_k, of which ``feature_loss`` is the distance from the trunk's states, and no perplexity.
    ``conditional_accuracy``: share of right targets among those whose shallower depths and main head are right, a forecast of
    the share of drafts that a decoder accepts.
    """
    means = totals.means()
    found = []
    for depth, count in enumerate(totals.counts.tolist()):
        loss = means["loss"][depth]
        entry: dict[str, Any] = {
            "depth": depth,
            "targets": int(count),
            "loss": loss if math.isfinite(loss) else None,
            "perplexity": math.exp(loss) if loss < 700 and not means["features"][depth] else None,
            "accuracy": means["accuracy"][depth],
        }
        if depth:
            entry["conditional_accuracy"] = means["conditional"][depth]
        if means["features"][depth]:
            entry["feature_loss"] = means["features"][depth]
        found.append(entry)
    return found


def table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    lines = [
        f"step {result['step']}, split {result['split']}: {counted(result['rows'], 'row')} of "
        f"{counted(result['sequence_length'], 'position')}, {result['dtype']}",
        f"{'head':<8}{'loss':>10}{'perplexity':>12}{'accuracy':>10}{'conditional':>13}{'targets':>10}",
    ]
    for entry in result["depths"]:
        head = f"depth {entry['depth']}" if entry["depth"] else "main"
        conditional = f"{entry['conditional_accuracy']:.4f}" if "conditional_accuracy" in entry else ""
        loss, perplexity = (_shown(entry[key], digits) for key, digits in (("loss", 4), ("perplexity", 2)))
        lines.append(f"{head:<8}{loss:>10}{perplexity:>12}{entry['accuracy']:>10.4f}{conditional:>13}{entry['targets']:>10}")
    if len(result["depths"]) > 1:
        lines.append("conditional: accuracy where the main head and all shallower depths are right, a forecast of acceptance")
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """The command line."""
    if not under_launcher():
        application("evaluate", Evaluation, launch, examples=EXAMPLES)
        return
    open_output()
    end_rank_with_parent(signal.SIGKILL)
    end_at_once()
    try:
        sys.exit(work(frozen(sys.argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
