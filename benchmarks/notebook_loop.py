"""Forward pass of the sequential MTP heads and their logits: all positions at once, as this project does, against one position
and one depth at a time, as explanatory notebooks on MTP do.

    python -m benchmarks.notebook_loop

The loop runs the same modules on single positions, so that a position's block sees that position alone. Outputs are checked
first, with attention of the heads at once cut down to the position itself; what is timed is the causal attention of training,
which does more. float32, no gradient.
"""

import argparse
import statistics
import sys

import torch
from torch import Tensor

from benchmarks.timing import compare, take_turns
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.mtp import build_heads
from mtp_dist.model.mtp.sequential import SequentialHeads
from mtp_dist.model.parameter import initialize
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.model.trunk import rotation

TOLERANCE = 1e-4


def at_once(heads: SequentialHeads, table: Tensor, tokens: Tensor, trunk: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
    """tokens [B, T], table [V, d], trunk states [B, T-D, d] -> logits [B, T-D, D, V]."""
    depth, positions = len(heads), trunk.shape[1]
    embedded = table[tokens]
    ahead = [embedded[:, k : k + positions] for k in range(1, depth + 1)]
    return torch.stack(heads(trunk, trunk, ahead, turn, mask), dim=2) @ table.T


def one_by_one(heads: SequentialHeads, table: Tensor, tokens: Tensor, trunk: Tensor, turn: Tensor) -> Tensor:
    """The same, position by position and depth by depth."""
    embedded, rows = table[tokens], []
    for i in range(trunk.shape[1]):
        hidden, found = trunk[:, i : i + 1], []
        for k, module in enumerate(heads.values(), start=1):
            state, hidden = module(hidden, embedded[:, i + k : i + k + 1], turn[:, i : i + 1], None)
            found.append(state.squeeze(1) @ table.T)
        rows.append(torch.stack(found, dim=1))
    return torch.stack(rows, dim=1)


class Setup:
    """Heads of D depths with initial weights, and random input of T tokens."""

    def __init__(self, hidden: int, depth: int, vocabulary: int, tokens: int, rows: int) -> None:
        model = ModelConfig(vocab_size=vocabulary, layers=1, hidden=hidden, heads=2, kv_heads=2, mlp=4 * hidden, init_std=0.1)
        model.head_dim = hidden // 2
        heads = build_heads(model, MTPConfig(depth=depth), ALONE)
        assert heads is not None
        initialize(heads, 5)
        source, positions = torch.Generator().manual_seed(11), tokens - depth
        self.heads = heads
        self.table = torch.randn(vocabulary, hidden, generator=source) * 0.1
        self.tokens = torch.randint(0, vocabulary, (rows, tokens), generator=source)
        self.trunk = torch.randn(rows, positions, hidden, generator=source)
        self.turn = rotation(torch.arange(positions), hidden // 2, model.rope_theta)
        self.itself = torch.eye(positions, dtype=torch.bool).view(1, 1, positions, positions)

    def loop(self) -> Tensor:
        return one_by_one(self.heads, self.table, self.tokens, self.trunk, self.turn)

    def vectorised(self, mask: Tensor | None = None) -> Tensor:
        return at_once(self.heads, self.table, self.tokens, self.trunk, self.turn, mask)

    def difference(self) -> float:
        """Largest difference of logits where both see each position alone."""
        return (self.loop() - self.vectorised(self.itself)).abs().max().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=512, help="T, tokens of a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    setup = Setup(options.hidden, options.depth, options.vocabulary, options.tokens, options.rows)
    difference = setup.difference()
    print(f"largest difference of logits: {difference:.1e}; threads: {torch.get_num_threads()}")
    if not difference <= TOLERANCE:
        sys.exit("not the same outputs")
    times = take_turns({"loop": setup.loop, "at once": setup.vectorised}, options.rounds, warm_up=3)
    for name, values in times.items():
        print(f"{name:8s} median {1e3 * statistics.median(values):.2f} ms, {1e3 * min(values):.2f} to {1e3 * max(values):.2f}")
    print(f"ratio: loop / at once = {compare(times['loop'], times['at once'])}")


if __name__ == "__main__":
    main()
