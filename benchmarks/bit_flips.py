"""Single flipped bits in a checkpoint: how many does a load notice? This project, torch.distributed.checkpoint, and DeepSpeed.

    python -m benchmarks.bit_flips --flips 200

One process, one small model with ZeRO-1 and AdamW, saved in the three formats. Bits are drawn at random, the same number in each
file. A flip is *noticed* where the load raises an error (ours: where the checkpoint does not verify); *silent* where it returns
other values than were saved; *harmless* where all loaded values are those that were saved.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.small_run import finish, random_batch, small_run
from mtp_dist.checkpoint.folder import sound
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.checkpoint.writer import Saver
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect
from mtp_dist.training.objective import coefficients
from mtp_dist.training.step import Workload, build

Values = dict[str, Tensor]
"""What a load gives back, by name."""


@contextmanager
def flip(path: Path, bit: int) -> Iterator[None]:
    """The file with one bit changed; as it was, afterwards."""
    with path.open("r+b", buffering=0) as file:

        def turn() -> None:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ (1 << bit % 8)]))

        turn()
        try:
            yield
        finally:
            turn()


def places(folder: Path, flips: int, source: random.Random) -> list[tuple[Path, int]]:
    """File and bit of `flips` flips, dealt out evenly over all files below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [(file, source.randrange(8 * file.stat().st_size)) for file in (files[n % len(files)] for n in range(flips))]


def workload(config: TrainingRun) -> Workload:
    """The model after one step, so that its moments are not zero."""
    made = build(config, build_mesh(config.parallel, torch.device("cpu")))
    made.step(random_batch(config), coefficients(config.mtp, 0), config.optim.lr)
    return made


def own_values(made: Workload) -> Values:
    return {f"{f.name}.{part}": value.clone() for f in made.engine.fragments() for part, value in f.parts.items()}


def own(made: Workload, config: TrainingRun, folder: Path) -> Callable[[], Values]:
    tokenizer = folder / "tokenizer.json"
    folder.mkdir()
    byte_tokenizer().save(str(tokenizer))
    saver = Saver(folder / "checkpoints", config, made.mesh, made.engine, tokenizer)
    path = saver.begin(step=1, progress={}, data={}, tracker={"run_id": "none"})
    saver.finish()
    tokenizer.unlink()
    (folder / "checkpoints" / "latest").unlink()  # nothing is read from it

    def load() -> Values:
        sound(path)
        Checkpoint(path).load_engine(made.engine)
        return own_values(made)

    return load


def torch_distributed(made: Workload, folder: Path) -> Callable[[], Values]:
    state = own_values(made)
    dcp.save(state, checkpoint_id=folder)

    def load() -> Values:
        into = {name: torch.empty_like(value) for name, value in state.items()}
        dcp.load(into, checkpoint_id=folder)
        return into

    return load


def deepspeed(made: Workload, folder: Path) -> Callable[[], Values]:
    engine = made.engine.engine
    engine.save_checkpoint(str(folder), tag="one")
    (folder / "latest").unlink()
    (folder / "zero_to_fp32.py").unlink(missing_ok=True)  # a program, which no load reads
    weights = dict(made.engine.parameters)

    def load() -> Values:
        path, _ = engine.load_checkpoint(str(folder), tag="one")
        if path is None:
            raise RuntimeError("nothing was loaded")
        found = {name: p.detach().clone() for name, p in weights.items()}
        optimizer = engine.optimizer
        for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            found[f"{number}.master"] = flat.detach().clone()
            for name, value in optimizer.optimizer.state[flat].items():
                found[f"{number}.{name}"] = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
        return found

    return load


def outcome(load: Callable[[], Values], expected: Values) -> str:
    try:
        found = load()
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever a library says of a damaged file; torch's CheckpointException is no Exception
        return "noticed"
    same = found.keys() == expected.keys() and all(_same(found[name], value) for name, value in expected.items())
    return "harmless" if same else "silent"


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(torch.equal(found, expected))


def _quiet(action: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    connect(choose_device("cpu"), timeout_minutes=5)
    logging.disable(logging.CRITICAL)
    base = Path(tempfile.mkdtemp(prefix="bit-flips-"))
    config = small_run(layers=2, hidden=32, vocabulary=264, depth=1, sequence=16, micro_batch=2, micro_batches=2)
    config.zero.stage, config.checkpoint.asynchronous = 1, False
    config = finish(config)
    rivals: dict[str, Callable[[Path], Callable[[], Values]]] = {
        "mtp_dist": lambda folder: own(workload(config), config, folder),
        "torch.distributed.checkpoint": lambda folder: torch_distributed(workload(config), folder),
        "DeepSpeed save_checkpoint": lambda folder: deepspeed(workload(config), folder),
    }
    print(f"| format | files | flips | noticed | silent: other values | harmless |\n|---|{'---:|' * 5}")
    for number, (name, made) in enumerate(rivals.items()):
        folder = base / str(number)
        load = _quiet(partial(made, folder))
        expected, counts = _quiet(load), Counter[str]()
        drawn = places(folder, options.flips, random.Random(options.seed))
        for file, bit in drawn:
            with flip(file, bit):
                counts[_quiet(partial(outcome, load, expected))] += 1
        row = [name, len({file for file, _ in drawn}), len(drawn), *(counts[kind] for kind in ("noticed", "silent", "harmless"))]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    shutil.rmtree(base)
    disconnect()


if __name__ == "__main__":
    main()
