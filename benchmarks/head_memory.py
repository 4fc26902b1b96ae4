"""Memory of the output head and its loss, forward and backward, for D = 0 .. 4 MTP depths: this project's ``head_loss`` against
``F.cross_entropy`` on whole logits of every depth.

    python -m benchmarks.head_memory

Each measurement is a fresh process: peak resident memory of one forward and backward, less the resident memory after states,
targets and head are there (what the gradients of states and head take is thus counted on both sides). Linux only. Whole logits of
4 depths take about 15 GiB with the default sizes; --rival-depth lowers the largest D that is tried with them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.model.head_loss import head_loss
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import ALONE

KINDS = ("own", "whole")
MIB = 1 << 20


def own_loss(states: list[Tensor], weight: nn.Parameter, wanted: Tensor) -> Tensor:
    """Sum over depths of the mean cross-entropy."""
    scale = torch.full((wanted.shape[0], len(states)), 1 / wanted[..., 0].numel())
    return head_loss(states, weight, wanted, scale, ALONE, None)[0]


def whole_loss(states: list[Tensor], weight: nn.Parameter, wanted: Tensor) -> Tensor:
    """The same from whole logits."""
    losses = [F.cross_entropy((s @ weight.T).flatten(0, 1), wanted[..., k].flatten()) for k, s in enumerate(states)]
    return torch.stack(losses).sum()


def inputs(depth: int, rows: int, sequence: int, hidden: int, vocabulary: int) -> tuple[list[Tensor], nn.Parameter, Tensor]:
    """1+D states [rows, S, d] that need a gradient, weight [V, d], targets [rows, S, 1+D]."""
    source = torch.Generator().manual_seed(3)
    weight = parameter((vocabulary, hidden), split=0, std=None, group=ALONE)
    weight.data.normal_(generator=source).mul_(0.1)
    states = [torch.randn(rows, sequence, hidden, generator=source).requires_grad_() for _ in range(1 + depth)]
    return states, weight, torch.randint(0, vocabulary, (rows, sequence, 1 + depth), generator=source)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(kind: str, depth: int, rows: int, sequence: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """In this process: the loss, and bytes at the peak above those after the build."""
    compute = own_loss if kind == "own" else whole_loss
    small = inputs(0, 1, 8, hidden, 64)
    compute(*small).backward()  # loads what the libraries load on first use
    given = inputs(depth, rows, sequence, hidden, vocabulary)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    loss = compute(*given)
    loss.backward()
    return {"loss": loss.item(), "bytes": _status("VmHWM") - before}


def measure_afresh(kind: str, depth: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.head_memory", "--one", kind, "--depth", str(depth)]
    for name in ("rows", "sequence", "hidden", "vocabulary"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode != 0:
        sys.exit(f"D = {depth}, {kind}: exit status {done.returncode} (-9: out of memory; try --rival-depth)\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--depth", type=int, default=4, help="largest D")
    parser.add_argument("--rival-depth", type=int, default=4, help="largest D for whole logits")
    parser.add_argument("--one", choices=KINDS, help="measure only this one, here, at D = --depth, and print JSON")
    options = parser.parse_args()
    if options.one:
        sizes = (options.rows, options.sequence, options.hidden, options.vocabulary)
        print(json.dumps(measure(options.one, options.depth, *sizes)))
        return
    own, whole = {}, {}
    for depth in range(options.depth + 1):
        own[depth] = measure_afresh("own", depth, options)
        line = f"D = {depth}: own {own[depth]['bytes'] / MIB:8.0f} MiB"
        if depth <= options.rival_depth:
            whole[depth] = measure_afresh("whole", depth, options)
            a, b = own[depth]["loss"], whole[depth]["loss"]
            if abs(a - b) > 1e-4 * abs(b):
                sys.exit(f"not the same loss: {a} and {b}")
            share = own[depth]["bytes"] / whole[depth]["bytes"]
            line += f", whole logits {whole[depth]['bytes'] / MIB:8.0f} MiB, own / whole {share:.4f}"
        print(line, flush=True)
    print(f"own, D = {options.depth} over D = 0: {own[options.depth]['bytes'] / own[0]['bytes']:.3f}")
    worst = max(own[depth]["bytes"] / whole[depth]["bytes"] for depth in whole)
    print(f"ratio: own / whole logits = {worst:.4f} at worst over D = 0 .. {max(whole)}")


if __name__ == "__main__":
    main()
