"""Held-out loss and accuracy under the layout that is there: the same rows, so the same number, in every layout.

Rows are chosen by their place in the stored order; a last partial batch is filled with padding rows, which count nowhere. Nothing
that training reads is touched.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from mtp_dist.config.heads import lookahead
from mtp_dist.data.batch import Batch
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.rows import Rows
from mtp_dist.training.agreement import together
from mtp_dist.training.statistics import Totals
from mtp_dist.training.step import ForwardOnly


class HeldOut:
    """`sequences` rows, evenly spaced over a split (all of them, if it has fewer). Collective: build and run it on every rank."""

    def __init__(self, model: ForwardOnly, dataset: Dataset, split: str, sequences: int) -> None:
        self.model = model
        config, self.mesh = model.config, model.mesh
        self.width = config.train.sequence_length + 1 + lookahead(config.mtp)
        self.rows = together(self.mesh, lambda: self._open(dataset, split) if self.mesh.is_reader else None)
        found = [min(sequences, len(self.rows)) if self.rows else 0]
        dist.broadcast_object_list(found, src=0, group=self.mesh.control)
        self.count = found[0]
        self.chosen = [i * len(self.rows) // self.count for i in range(self.count)] if self.rows else []

    def _open(self, dataset: Dataset, split: str) -> Rows:
        train = self.model.config.train
        return Rows(dataset, split, train.sequence_length, lookahead(self.model.config.mtp))

    def _share(self, begin: int, rows: int) -> Batch:
        """Chosen rows begin .. begin + rows, padded behind the last one."""
        assert self.rows is not None
        parts = [self.rows.read(row, row + 1) for row in self.chosen[begin : begin + rows]]
        tokens = torch.cat([torch.empty(0, self.width, dtype=torch.int64), *(part.tokens for part in parts)])
        documents = torch.cat([torch.empty(0, self.width, dtype=torch.int32), *(part.documents for part in parts)])
        return self.rows.pad(Batch(tokens, documents, [part.samples[0] for part in parts]), rows)

    def run(self, micro_batch: int, micro_batches: int, progress: Callable[[int], None] | None = None) -> Totals:
        """Sums over all rows, in passes of `micro_batches` micro-batches a replica. `progress` is told the rows done after
        each."""
        share = micro_batch * micro_batches
        batch = share * self.mesh.parallel.data
        total: Totals | None = None
        for begin in range(0, self.count, batch):
            own = begin + self.mesh.data_rank * share
            mine = together(self.mesh, lambda own=own: self._share(own, share) if self.mesh.is_reader else None)  # type: ignore[misc]
            part = self.model.evaluate(mine, share, micro_batch)
            total = part if total is None else total + part
            if progress is not None:
                progress(min(begin + batch, self.count))
        assert total is not None
        return total
