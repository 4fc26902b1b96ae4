"""One optimizer step under any layout: prologue (rows, counts) -> pipeline schedule -> epilogue (sums, reduce, norm, AdamW)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.attention import Choice, choose, obstacle
from mtp_dist.config.heads import embeds_on_last, lookahead
from mtp_dist.config.layout import key_value_sharers, micro_batches
from mtp_dist.config.schema import TrainingRun
from mtp_dist.data.batch import Batch
from mtp_dist.model.attention import capability, document_starts, most_documents
from mtp_dist.model.parameter import initialize
from mtp_dist.parallel.engine import Engine, StepOutcome
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.parameter_groups import freeze_trunk
from mtp_dist.parallel.pipeline import Pipeline
from mtp_dist.parallel.sharded_parameters import initialize_sharded
from mtp_dist.parallel.stages import build_chunks
from mtp_dist.parallel.timeline import Timeline, span
from mtp_dist.training.exchange import global_counts, share
from mtp_dist.training.objective import target_scale
from mtp_dist.training.own_tokens import Draws, own_tokens
from mtp_dist.training.phase_clock import PhaseClock
from mtp_dist.training.statistics import Totals, gather


@dataclass
class ForwardOnly:
    """The model of one rank in its pipeline, without an optimizer: what evaluation needs."""

    config: TrainingRun
    mesh: Mesh
    pipeline: Pipeline
    attention: Choice

    def evaluate(self, batch: Batch | None, rows: int, micro_batch: int) -> Totals:
        """`rows` rows a replica (a multiple of `micro_batch`), `batch` on the reader. Touches nothing that training reads.
        Collective."""
        tokens, documents = share(batch, (rows, self.config.train.sequence_length + 1 + lookahead(self.config.mtp)), self.mesh)
        counts = global_counts(tokens, documents, self.config.mtp, self.mesh)
        scale = torch.zeros(len(counts), device=tokens.device)
        self._compute(self.config.mtp.depth)
        return gather(self.pipeline.evaluate(self._rows(tokens, documents, scale), rows // micro_batch), counts, self.mesh)

    def _compute(self, depths: int) -> None:
        """From now on only so many depths are computed."""
        for chunk in self.pipeline.chunks:
            chunk.compute(depths)  # type: ignore[operator]

    def _rows(self, tokens: Tensor, documents: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """What the chunks take, a row of each for every row of the batch."""
        rows = {"tokens": tokens, "documents": documents, "scale": scale.expand(len(tokens), -1)}
        if self.attention.backend == "varlen":
            attending = documents[:, : self.config.train.sequence_length]
            rows["starts"] = document_starts(attending, most_documents(attending))
        return rows


@dataclass
class Workload(ForwardOnly):
    """The model of one rank, ready to train: its chunks in a pipeline, and its optimizer."""

    engine: Engine
    clock: PhaseClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = PhaseClock(self.mesh.device)

    def record(self, timeline: Timeline | None) -> None:
        """From now on steps are recorded there; None: no longer."""
        self.pipeline.timeline = self.engine.timeline = timeline

    def gradients(self, batch: Batch | None, parts: list[float], draws: Draws | None = None) -> tuple[Tensor | None, Tensor]:
        """Forward and backward of this replica's rows (`batch` on its reader, else None). `parts`: weights of L_main, L_1 ..
        L_d; depths beyond d are not computed (with ZeRO-2 and 3: weigh 0), and count no target. `draws`: of the model's own
        predictions, which it then reads here and there; None: it reads true tokens.

        Gradients are added to the parameters, not yet reduced. Returns what ``gather`` takes: the last chunk's result and the
        global counts. Collective.
        """
        train, mesh = self.config.train, self.mesh
        shape = (train.global_batch // mesh.parallel.data, train.sequence_length + 1 + lookahead(self.config.mtp))
        with span(self.pipeline.timeline, "exchange"):
            tokens, documents = share(batch, shape, mesh)
            counts = global_counts(tokens, documents, self.config.mtp, mesh)
        counts[len(parts) :] = 0
        scale = target_scale(parts, counts, mesh.parallel.data)
        # DeepSpeed keeps the shard of a gradient that is not renewed, and would apply it again: there it is renewed with zeros.
        self._compute(self.config.mtp.depth if self.engine.shards_gradients else len(parts) - 1)
        rows = self._rows(tokens, documents, scale)
        if draws is not None and draws.probability > 0:
            mine = range(mesh.data_rank * shape[0], (mesh.data_rank + 1) * shape[0])
            rows["own"] = own_tokens(draws, mine, train.sequence_length, self.config.mtp.depth).to(tokens.device)
        result = self.pipeline.step(rows)
        if result is not None:
            result[1:].view(len(counts), -1)[len(parts) :] = 0
        return result, counts

    def step(
        self, batch: Batch | None, parts: list[float], lr: float, draws: Draws | None = None
    ) -> tuple[Totals, StepOutcome]:
        """A whole optimizer step. Collective. The statistics are read last: reading them waits for the device."""
        self.clock.restart()
        result, counts = self.gradients(batch, parts, draws)
        self.clock.mark()
        outcome = self.engine.step(lr)
        self.clock.mark()
        return gather(result, counts, self.mesh), outcome


def build(config: TrainingRun, mesh: Mesh, draft_tokens: Sequence[int] | None = None) -> Workload:
    """This rank's part of the model with its initial weights, its pipeline and its optimizer. `draft_tokens`: as of ``Chunk``.
    Collective."""
    dtype = getattr(torch, config.train.dtype)
    attention = choose(config.model, config.train, mesh.device.type, capability(mesh.device))
    chunks = build_chunks(config, mesh, draft_tokens)
    if config.mtp.freeze_trunk:
        freeze_trunk(chunks)
    for chunk in chunks:
        if config.zero.stage == 3:
            initialize_sharded(chunk, config.seed, mesh, dtype)
        else:
            initialize(chunk, config.seed)
        chunk.attention = attention.backend  # type: ignore[assignment]
        chunk.recompute = config.train.recompute  # type: ignore[assignment]
        if config.train.compile:
            chunk.compile_blocks()  # type: ignore[operator]
    chunks.to(mesh.device)
    replica = embeds_on_last(config.model, config.mtp)
    engine = Engine(
        chunks,
        mesh,
        config.optim,
        config.zero,
        dtype,
        replica=replica,
        micro_batches=micro_batches(config),
        sharers=key_value_sharers(config.model, config.parallel.tensor),
    )
    if dtype != torch.float32:
        engine.write_initial_masters(config.seed)
    pipeline = _pipeline(config, mesh, chunks)
    if engine.shards_gradients:
        pipeline.leave_passes_to(engine.forward, engine.backward)
    return Workload(config, mesh, pipeline, attention, engine)


def load_forward_only(config: TrainingRun, mesh: Mesh, checkpoint: Checkpoint) -> ForwardOnly:
    """This rank's part of the model with a checkpoint's weights, whatever layout saved it, and with the attention that it was
    trained with or another one that runs here. Collective."""
    attention = _evaluating_attention(config, mesh)
    chunks = build_chunks(config, mesh, checkpoint.draft_tokens)
    for chunk in chunks:
        chunk.attention = attention.backend  # type: ignore[assignment]
    checkpoint.load_weights(chunks, getattr(torch, config.train.dtype))
    chunks.to(mesh.device)
    return ForwardOnly(config, mesh, _pipeline(config, mesh, chunks), attention)


def _evaluating_attention(config: TrainingRun, mesh: Mesh) -> Choice:
    """``train.attention`` where it runs on this device, else auto's. Nothing is computed again, as there is no backward pass."""
    train, able = replace(config.train, recompute="none"), capability(mesh.device)
    if train.attention != "auto" and obstacle(train.attention, config.model, train, mesh.device.type, able) is not None:
        train = replace(train, attention="auto")
    return choose(config.model, train, mesh.device.type, able)


def _pipeline(config: TrainingRun, mesh: Mesh, chunks: nn.ModuleList) -> Pipeline:
    positions = config.train.sequence_length // (mesh.tensor.size if mesh.tensor.shares_positions else 1)
    edge = (config.train.micro_batch, positions, config.model.hidden)
    dtype = getattr(torch, config.train.dtype)
    return Pipeline(chunks, mesh, micro_batches(config), edge, dtype, frozen_trunk=config.mtp.freeze_trunk)
