"""A training step of sequential MTP heads: all positions at once, against one position and one depth at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.notebook_loop

The rival is how explanatory notebooks on MTP write it: depth k at position i joins the state of depth k-1 with the embedding of
token i+k, and sends it through a projection, a weightless RMSNorm, a transformer layer that sees this position alone, and the
shared embedding as output matrix. Here it is torch's own ``nn.TransformerEncoderLayer`` (2 heads, inner width 2,048, no dropout)
called once for each position and depth. At once, ``SimpleMTP`` lets the same parameters act on all positions together; attention
of a position to itself is its value. Both give the same logits and gradients, which is checked first. float32, forward, loss and
backward.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compare, take_turns
from mtp_dist.model.mtp.notebook import SimpleMTP, rms_norm

TOLERANCE = 1e-4
"""Largest difference of logits, and of gradients over their largest element."""


def one_by_one(model: SimpleMTP, tokens: Tensor) -> Tensor:
    """As ``SimpleMTP.forward``: position by position, depth by depth."""
    embedded, rows = model.embed(tokens), []
    for i in range(tokens.shape[1] - model.num_heads):
        state, found = embedded[:, i], []
        for k, (projection, layer) in enumerate(zip(model.projections, model.layers, strict=True), start=1):
            x = rms_norm(projection(torch.cat((state, embedded[:, i + k]), dim=-1)))
            state = layer(x.unsqueeze(1)).squeeze(1)
            found.append(state @ model.embed.weight.T)
        rows.append(torch.stack(found, dim=1))
    return torch.stack(rows, dim=1)


class Setup:
    """Heads with random weights, and a row of random tokens."""

    def __init__(self, hidden: int, depth: int, vocabulary: int, tokens: int, rows: int) -> None:
        torch.manual_seed(5)
        self.heads = SimpleMTP(hidden, vocabulary, depth)
        nn.init.normal_(self.heads.embed.weight, std=0.1)
        self.tokens = torch.randint(0, vocabulary, (rows, tokens))

    def _train(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy over positions and depths, and its gradients."""
        depth, positions = logits.shape[2], logits.shape[1]
        # Depth k (from 1) at position i predicts token i+k+1; where that lies beyond the row, the last token stands in.
        ahead = torch.arange(positions).unsqueeze(1) + torch.arange(2, depth + 2)
        wanted = self.tokens[:, ahead.clamp(max=self.tokens.shape[1] - 1)]
        self.heads.zero_grad()
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
        loss.backward()
        return logits.detach()

    def loop(self) -> Tensor:
        return self._train(one_by_one(self.heads, self.tokens))

    def vectorised(self) -> Tensor:
        return self._train(self.heads(self.tokens))

    def difference(self) -> float:
        """Largest difference between the two, of logits, or of a gradient over its largest element."""
        results = []
        for run in (self.loop, self.vectorised):
            logits = run()
            gradients = {name: p.grad.clone() for name, p in self.heads.named_parameters() if p.grad is not None}
            results.append((logits, gradients))
        (slow, slow_gradients), (fast, fast_gradients) = results
        worst = (slow - fast).abs().max().item()
        for name, gradient in slow_gradients.items():
            other = fast_gradients[name]
            worst = max(worst, ((gradient - other).abs().max() / gradient.abs().max().clamp(min=1e-12)).item())
        return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=512, help="T, tokens of a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    setup = Setup(options.hidden, options.depth, options.vocabulary, options.tokens, options.rows)
    difference = setup.difference()
    print(f"largest difference of logits and gradients: {difference:.1e}; threads: {torch.get_num_threads()}")
    if not difference <= TOLERANCE:
        sys.exit("not the same computation")
    times = take_turns({"loop": setup.loop, "at once": setup.vectorised}, options.rounds)
    for name, values in times.items():
        print(f"{name:8s} median {1e3 * statistics.median(values):.2f} ms, {1e3 * min(values):.2f} to {1e3 * max(values):.2f}")
    print(f"ratio: loop / at once = {compare(times['loop'], times['at once'])}")


if __name__ == "__main__":
    main()
