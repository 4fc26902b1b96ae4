"""A training step of sequential MTP heads: all positions at once, against one position and one depth at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.notebook_loop

The rival is how explanatory notebooks on MTP write it: depth k at position i joins the state of depth k-1 with the embedding of
token i+k, and sends it through a projection, a weightless RMSNorm, a transformer layer that sees this position alone, and the
shared embedding as output matrix. Here it is torch's own ``nn.TransformerEncoderLayer`` (2 heads, inner width 2,048, no dropout)
called once for each position and depth. At once, the same parameters act on all positions together; attention of a position to
itself is its value. Both give the same logits and gradients, which is checked first. float32, forward, loss and backward.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compare, take_turns

TOLERANCE = 1e-4
"""Largest difference of logits, and of gradients over their largest element."""


class NotebookHeads(nn.Module):
    """D heads over tokens int64 [B, T]: logits [B, T-D, D, V]."""

    def __init__(self, hidden: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.hidden, self.depth = hidden, depth
        self.embedding = nn.Embedding(vocabulary, hidden)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.projections = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, nhead=2, dropout=0.0, batch_first=True) for _ in range(depth)
        )

    def _join(self, k: int, state: Tensor, embedded: Tensor) -> Tensor:
        joined: Tensor = self.projections[k](torch.cat((state, embedded), dim=-1))
        return F.rms_norm(joined, (self.hidden,), eps=1e-8)

    def one_by_one(self, tokens: Tensor) -> Tensor:
        """Position by position, depth by depth."""
        embedded, rows = self.embedding(tokens), []
        for i in range(tokens.shape[1] - self.depth):
            state, found = embedded[:, i], []
            for k, layer in enumerate(self.layers):
                x = self._join(k, state, embedded[:, i + k + 1])
                state = layer(x.unsqueeze(1)).squeeze(1)
                found.append(state @ self.embedding.weight.T)
            rows.append(torch.stack(found, dim=1))
        return torch.stack(rows, dim=1)

    def at_once(self, tokens: Tensor) -> Tensor:
        """All positions of a depth together."""
        embedded, positions, found = self.embedding(tokens), tokens.shape[1] - self.depth, []
        state = embedded[:, :positions]
        for k, layer in enumerate(self.layers):
            x = self._join(k, state, embedded[:, k + 1 : k + 1 + positions])
            state = self._alone(layer, x)
            found.append(state @ self.embedding.weight.T)
        return torch.stack(found, dim=2)

    def _alone(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``nn.TransformerEncoderLayer`` where every position sees itself only."""
        assert isinstance(layer, nn.TransformerEncoderLayer)
        attention, d = layer.self_attn, self.hidden
        assert attention.in_proj_weight is not None
        value = F.linear(x, attention.in_proj_weight[2 * d :], attention.in_proj_bias[2 * d :])
        x = layer.norm1(x + attention.out_proj(value))
        out: Tensor = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
        return out


class Setup:
    """Heads with random weights, and a row of random tokens."""

    def __init__(self, hidden: int, depth: int, vocabulary: int, tokens: int, rows: int) -> None:
        torch.manual_seed(5)
        self.heads = NotebookHeads(hidden, depth, vocabulary)
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
        return self._train(self.heads.one_by_one(self.tokens))

    def vectorised(self) -> Tensor:
        return self._train(self.heads.at_once(self.tokens))

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
