"""Saving and loading: how long training waits for a background save and for a waiting one; throughput against DeepSpeed's own.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoint

Two replicas under ZeRO-1, bfloat16 with float32 masters, AdamW; one thread each. Contestants take turns in the same processes:
  background   this project, checkpoint.asynchronous=true: time until training may go on
  waiting      this project, checkpoint.asynchronous=false: until the checkpoint is complete, forced to the disk and read back
  whole        the background save until it is complete: what `waiting` does, and the copy
  deepspeed    engine.save_checkpoint, which neither forces to the disk nor checks
Loads: this project's with the check of every sum, and without it; DeepSpeed's load_checkpoint, which checks none. Every ratio is
the rival's time over that of this project. The folder (--folder) should be on the disk that matters.
"""

import argparse
import contextlib
import copy
import io
import logging
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.small_run import finish, random_batch, small_run
from benchmarks.timing import compare, seconds
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.checkpoint.writer import Saver
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import Workload, build


class Saves:
    """One workload, and the saves of it in a folder; each leaves nothing but the newest checkpoint of its kind."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload, self.folder, self.step = workload, folder, 0
        tokenizer = folder / "tokenizer.json"
        if dist.get_rank() == 0:
            byte_tokenizer().save(str(tokenizer))
        dist.barrier()
        self.savers = {}
        for kind, asynchronous in (("background", True), ("waiting", False)):
            config = copy.deepcopy(workload.config)
            config.checkpoint.asynchronous, config.checkpoint.keep_last = asynchronous, 1
            self.savers[kind] = Saver(folder / kind, config, workload.mesh, workload.engine, tokenizer)

    def own(self, kind: str) -> Path:
        self.step += 1
        return self.savers[kind].begin(step=self.step, progress={}, data={}, tracker={"run_id": "none"})

    def deepspeed(self) -> None:
        self.workload.engine.engine.save_checkpoint(str(self.folder / "deepspeed"), tag="one")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def together(action: Callable[[], object]) -> float:
    """Seconds of the slower rank."""
    dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()):
        time = torch.tensor(seconds(action))
    dist.all_reduce(time, op=dist.ReduceOp.MAX)
    return time.item()


def measure_saves(saves: Saves, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ("background", "whole", "waiting", "deepspeed")}
    background = saves.savers["background"]

    def one(name: str) -> dict[str, float]:
        if name == "background":
            stall = together(lambda: saves.own("background"))
            return {"background": stall, "whole": stall + together(background.finish)}
        return {name: together((lambda: saves.own("waiting")) if name == "waiting" else saves.deepspeed)}

    for number in range(rounds + 1):
        order = ["background", "waiting", "deepspeed"]
        for name in order if number % 2 else order[::-1]:
            found = one(name)
            if number:  # the first round warms up
                for key, value in found.items():
                    times[key].append(value)
    return times


def measure_loads(saves: Saves, rounds: int) -> dict[str, list[float]]:
    path = saves.own("waiting")
    saves.deepspeed()
    engine, rank, world = saves.workload.engine, dist.get_rank(), dist.get_world_size()

    def load(*, check: bool) -> None:
        checkpoint = Checkpoint(path)
        if check and checkpoint.damages(rank, world):
            raise RuntimeError("damaged")
        checkpoint.load_engine(engine)

    contestants: dict[str, Callable[[], object]] = {
        "checked": lambda: load(check=True),
        "unchecked": lambda: load(check=False),
        "deepspeed": lambda: engine.engine.load_checkpoint(str(saves.folder / "deepspeed"), tag="one"),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            time = together(contestants[name])
            if number:
                times[name].append(time)
    return times


def report(title: str, times: dict[str, list[float]], size: int) -> None:
    say(title)
    for name, values in times.items():
        middle = statistics.median(values)
        speed = "" if name == "background" else f", {size / middle / 1e6:.0f} MB/s"
        say(f"  {name:11s} median {1e3 * middle:.1f} ms, {1e3 * min(values):.1f} to {1e3 * max(values):.1f}{speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--folder", default="", help="on the disk to measure; empty: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect(choose_device("cpu"), timeout_minutes=10)
    logging.disable(logging.CRITICAL)
    config = small_run(
        layers=options.layers, hidden=options.hidden, vocabulary=options.vocabulary, depth=1, sequence=16, micro_batch=1,
        micro_batches=1,
    )  # fmt: skip
    world = dist.get_world_size()
    config.parallel.data, config.train.global_batch, config.data.lanes = world, world, world
    config.zero.stage, config.train.dtype = 1, "bfloat16"
    config = finish(config)
    workload = build(config, build_mesh(config.parallel, torch.device("cpu")))
    batch, rows = random_batch(config), config.train.global_batch // config.parallel.data
    mine = slice(workload.mesh.data_rank * rows, (workload.mesh.data_rank + 1) * rows)
    batch.tokens, batch.documents = batch.tokens[mine], batch.documents[mine]
    workload.step(batch, coefficients(config.mtp, 0), config.optim.lr)  # moments that are not zero
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    place = [tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder or None) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place, src=0)
    folder = Path(place[0])
    saves = Saves(workload, folder)
    own = sum(record.size for record in Checkpoint(_finished(saves)).manifest.files.values())
    say(f"{own / 1e6:.0f} MB a checkpoint, {dist.get_world_size()} ranks, folder {folder}")
    saved = measure_saves(saves, options.rounds)
    report("saving", saved, own)
    say(f"ratio: waiting / background stall = {compare(saved['waiting'], saved['background'])}")
    say(f"ratio: DeepSpeed's save / background stall = {compare(saved['deepspeed'], saved['background'])}")
    say(f"ratio: DeepSpeed's save / waiting = {compare(saved['deepspeed'], saved['waiting'])}")
    loaded = measure_loads(saves, options.rounds)
    report("loading", loaded, own)
    say(f"ratio: DeepSpeed's load / checked = {compare(loaded['deepspeed'], loaded['checked'])}")
    say(f"ratio: DeepSpeed's load / unchecked = {compare(loaded['deepspeed'], loaded['unchecked'])}")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    disconnect()


def _finished(saves: Saves) -> Path:
    path = saves.own("background")
    saves.savers["background"].finish()
    return path


if __name__ == "__main__":
    main()
