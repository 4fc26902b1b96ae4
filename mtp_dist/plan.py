"""What a training configuration would do, without doing it: ``python -m mtp_dist.plan key=value ...``.

Takes the settings of ``mtp_dist.train`` and checks them alike, apart from places (run_dir, init.checkpoint); needs no processes,
and no dataset where ``model.vocab_size`` is given. With the ``run_dir`` of a run that exists it plans that run, with what is
typed laid over its settings. Prints the layout, parameters, batches, memory of each rank and operations a
token, compares pipeline schedules by simulating a step, and names the smallest layout of this run that fits ``world_memory_gib``.
``model=llama3_8b`` alone is a question too: what was not given is assumed as such a model is usually trained, and said first.
Torch is loaded only for what needs it: a pipeline's schedules, and ``measure=true``.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtp_dist.config import versions
from mtp_dist.config.attention import possible
from mtp_dist.config.command import application
from mtp_dist.config.compose import compose
from mtp_dist.config.heads import detaches, embeds_on_last, modules
from mtp_dist.config.layout import (
    SCHEDULES,
    chunks,
    chunks_of_rank,
    is_v,
    micro_batches,
    tokens_per_step,
    total_steps,
    world_size,
)
from mtp_dist.config.numbers import plain
from mtp_dist.config.resolution import resolve
from mtp_dist.config.rules import above
from mtp_dist.config.schema import ParallelConfig, Plan
from mtp_dist.config.validation import validate_training
from mtp_dist.data.dataset import Dataset
from mtp_dist.errors import UserError
from mtp_dist.freezing import continued_as
from mtp_dist.launching import available_cores, threads_of_each
from mtp_dist.parallel import budget
from mtp_dist.parallel.cost import costs
from mtp_dist.parallel.placement import layers_of_chunks
from mtp_dist.quantity import counted

EXAMPLES = (
    "python -m mtp_dist.plan model=llama3_8b",
    "python -m mtp_dist.plan experiment=quickstart",
    "python -m mtp_dist.plan model=llama3_8b model.vocab_size=128256 parallel.pipeline=4 parallel.tensor=2 parallel.data=2 "
    "train.steps=1000",
    "python -m mtp_dist.plan experiment=quickstart measure=true",
)
GIB = 2**30
VOCABULARY = 32000
TOKENS_A_PARAMETER = 20
"""Hoffmann et al., arXiv 2203.15556."""
USUAL_BATCHES = (
    (10**9, {"train.sequence_length": 4096, "train.global_batch": 1024, "train.micro_batch": 1, "data.lanes": 64}),
    (10**8, {"train.sequence_length": 2048, "train.global_batch": 256}),
)
"""Models of at least so many parameters: about 4 and 0.5 million tokens a step."""
LARGEST_WORLD = 4096
REMEDIES: tuple[dict[str, object], ...] = (
    {"parallel.sequence_parallel": True},
    {"parallel.sequence_parallel": True, "train.recompute": "full"},
    {"parallel.sequence_parallel": True, "train.recompute": "full", "parallel.schedule": "1f1b"},
)
"""What saves memory at the least cost of time, in this order."""
# Tensor ranks beyond one node's eight devices talk over the slow network in every layer.
LARGEST_TENSOR = 8


def prepare(config: Plan) -> tuple[Plan, Dataset | None]:
    """The valid configuration with derived settings filled, and its dataset if there is one. Raises UserError."""
    versions.check()
    above("world_memory_gib", config.world_memory_gib, 0)
    if config.measure and config.mtp.freeze_trunk:
        raise UserError("measure=true times passes in which everything learns; leave it out, or set mtp.freeze_trunk=false")
    dataset = _dataset(config)
    vocabulary = dataset.vocab_size if dataset else None
    validate_training(config, vocabulary)
    full = resolve(config, vocabulary)
    assert isinstance(full, Plan)
    return full, dataset


def with_assumptions(typed: list[str]) -> tuple[Plan, list[str]]:
    """The composed settings, completed where they leave the size of the run or the layout open, and what was assumed for that.

    An experiment settles both, and only gets the length of the run where it has none. Wrong settings are returned as they are,
    for ``prepare`` to say so.
    """
    keys = {word.partition("=")[0] for word in typed}
    config, found = compose("plan", Plan, typed), dict[str, str]()
    if config.model.vocab_size is None and not config.data.path:
        found["model.vocab_size"] = str(VOCABULARY)
    endless = config.train.steps is None and config.train.tokens is None
    length = {"train.steps": "1"} if endless else {}

    def attempt(more: dict[str, str]) -> Plan | None:
        try:
            return prepare(compose("plan", Plan, [*typed, *(f"{key}={text}" for key, text in more.items())]))[0]
        except UserError:
            return None

    full = attempt(found | length)
    if full is None:
        return config, []
    parameters = budget.chunk_parameters(full.model, full.mtp, full.model.layers).total
    if "experiment" not in keys:
        usual = next((settings for least, settings in USUAL_BATCHES if parameters >= least), {})
        batches = {key: str(number) for key, number in usual.items() if key not in keys}
        if batches and (larger := attempt(found | length | batches)):
            full, found = larger, found | batches
    if endless:
        found["train.tokens"] = plain(float(f"{TOKENS_A_PARAMETER * parameters:.1e}"))
    settled = any(key in ("experiment", "parallel") or key.startswith(("parallel.", "launch.")) for key in keys)
    if not settled and (smallest := smallest_layout(full)):
        chosen = smallest.parallel
        found |= {f"parallel.{name}": str(getattr(chosen, name)) for name in ("pipeline", "tensor", "data")
                  if getattr(chosen, name) != getattr(full.parallel, name)}  # fmt: skip
    assumed = [f"{key}={text}" for key, text in found.items()]
    return compose("plan", Plan, [*typed, *assumed]), assumed


def _dataset(config: Plan) -> Dataset | None:
    if not config.data.path:
        if config.model.vocab_size is None:
            raise UserError("model.vocab_size is null and data.path is empty; give one of them, e.g. model.vocab_size=32000")
        return None
    if config.model.vocab_size is not None and not Path(config.data.path).exists():
        return None
    return Dataset.open(config.data.path)


def text(config: Plan, dataset: Dataset | None) -> str:
    """The whole plan of a prepared configuration."""
    return "\n\n".join(parts(config, dataset))


def parts(config: Plan, dataset: Dataset | None) -> Iterator[str]:
    """Its parts, each when it is asked for: the later ones take seconds."""
    yield _layout(config)
    yield _parameters(config)
    yield _batches(config, dataset)
    yield _memory(config)
    yield _operations(config)
    if config.parallel.pipeline > 1:
        yield _schedules(config)
    yield _fit(config)


def _layout(config: Plan) -> str:
    parallel = config.parallel
    kind = f"{parallel.schedule}, {'V' if is_v(parallel) else 'classic'} placement" if parallel.pipeline > 1 else "no pipeline"
    rows = [["pipeline rank", "global ranks", "chunk", "trunk layers", "also holds"]]
    layers, count = layers_of_chunks(config), chunks(parallel)
    for pipeline_rank in range(parallel.pipeline):
        shared = False
        for number in chunks_of_rank(parallel, pipeline_rank):
            also = list(_beside_layers(config, number == 0, number == count - 1, shared))
            shared = shared or number == 0
            first_of_rank = number == chunks_of_rank(parallel, pipeline_rank)[0]
            ranks = global_ranks(parallel, pipeline_rank)
            shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} .. {ranks[-1]}"
            names = [str(pipeline_rank), shown] if first_of_rank else ["", ""]
            rows.append([*names, str(number), _range(layers[number]), ", ".join(also)])
    sizes = f"pipeline {parallel.pipeline} x data {parallel.data} x tensor {parallel.tensor}"
    attention = " or ".join(str(choice) for choice in possible(config))
    return f"layout: {sizes} = world size {world_size(parallel)} ({kind})\n{_table(rows)}\nattention: {attention}"


def _beside_layers(config: Plan, first: bool, last: bool, shared: bool) -> Iterator[str]:
    """What a chunk holds beside its layers."""
    if first:
        yield "embedding"
    if not last:
        return
    yield "final norm"
    if count := modules(config.mtp):
        times = f" used {config.mtp.depth} times" if config.mtp.depth > count else ""
        yield f"{counted(count, 'MTP module')}{times}"
    tied = config.model.tie_embeddings
    if not first and embeds_on_last(config.model, config.mtp):
        yield "the same embedding" if shared else "replica of the embedding"
    yield "output head (the embedding)" if tied else "output head"


def global_ranks(parallel: ParallelConfig, pipeline_rank: int) -> range:
    """The ranks of one pipeline rank: tensor ranks are neighbours, then replicas."""
    width = parallel.data * parallel.tensor
    return range(pipeline_rank * width, (pipeline_rank + 1) * width)


def _parameters(config: Plan) -> str:
    whole = budget.chunk_parameters(config.model, config.mtp, config.model.layers)
    rows = [["parameters", "trunk", "embedding", "MTP modules", "output matrix", "total"], _parameter_row("whole model", whole)]
    for pipeline_rank in range(config.parallel.pipeline):
        held = budget.rank_parameters(config, pipeline_rank)
        rows.append(_parameter_row(f"pipeline rank {pipeline_rank}, each", held))
    own = {
        "vocabulary projections": budget.own_projection(config.model, config.mtp),
        "embeddings of their own": budget.own_embedding(config.model, config.mtp),
    }
    said = " and ".join(f"{modules(config.mtp) * size:,} are {what}" for what, size in own.items() if size)
    return _table(rows) + (f"\nof the MTP modules {said}" if said else "")


def _parameter_row(name: str, held: budget.Parameters) -> list[str]:
    return [name, *(f"{count:,}" for count in (held.trunk, held.embedding, held.heads, held.output, held.total))]


def _batches(config: Plan, dataset: Dataset | None) -> str:
    train, steps, tokens = config.train, total_steps(config), tokens_per_step(config)
    each = "the one replica" if config.parallel.data == 1 else f"each of {config.parallel.data} replicas"
    lines = [
        f"batch: {counted(train.global_batch, 'row')} of {counted(train.sequence_length, 'position')} = "
        f"{counted(tokens, 'token', commas=True)} a step; {counted(micro_batches(config), 'micro-batch', 'micro-batches')} of "
        f"{counted(train.micro_batch, 'row')} for {each}",
        f"run: {counted(steps, 'step', commas=True)}, {counted(steps * tokens, 'token', commas=True)}",
    ]
    if dataset is not None:
        lines[-1] += f" = {steps * tokens / dataset.split('train').tokens:.2f} epochs of {config.data.path}"
    elif config.data.path:
        lines.append(f"note: data.path={config.data.path} does not exist; model.vocab_size={config.model.vocab_size} is taken")
    return "\n".join(lines)


def _memory(config: Plan) -> str:
    zero, replicas = config.zero.stage, config.parallel.data
    weight, shared = budget.dtype_bytes(config), f" / {replicas} replicas" if config.zero.stage and replicas > 1 else ""
    optimizer = f"{budget.MASTER_BYTES} + {budget.MOMENT_BYTES}" if zero else f"{budget.MOMENT_BYTES}"
    on_host, saves = config.zero.offload or config.mtp.freeze_trunk, config.checkpoint.asynchronous
    rows = [["GiB a rank", "weights", "gradients", "optimizer", "activations*", "working*", "total*"]]
    rows[0] += ["host"] * on_host + ["host, save"] * saves
    for pipeline_rank in range(config.parallel.pipeline):
        memory = budget.rank_memory(config, pipeline_rank)
        values = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.working, memory.total]
        values += [memory.host] * on_host + [memory.snapshot] * saves
        rows.append([f"pipeline rank {pipeline_rank}", *(f"{value / GIB:.3f}" for value in values)])
    whole = budget.chunk_parameters(config.model, config.mtp, config.model.layers)
    trained = whole.heads if config.mtp.freeze_trunk else whole.total
    saved = budget.MASTER_BYTES * (whole.total - trained) + budget.CHECKPOINT_BYTES * trained
    kept = f", {budget.MASTER_BYTES} a frozen one" if config.mtp.freeze_trunk else ""
    return "\n".join([
        f"memory: {config.train.dtype}, ZeRO-{zero}; bytes a parameter: weights {weight}"
        f"{shared if zero == 3 else ''}, gradients {budget.GRADIENT_BYTES}, optimizer "
        f"({'master + ' if zero else ''}moments) {optimizer}{shared}",
        _table(rows),
        "* estimates: kept for backward passes in flight; buffers of the loss and the optimizer step",
        f"checkpoint: {saved / GIB:.3f} GiB ({budget.CHECKPOINT_BYTES} bytes a parameter{kept})",
    ])


def _operations(config: Plan) -> str:
    each = budget.flops_per_token(config)
    step = each * tokens_per_step(config)
    how = f"forward and backward: 6 a matrix element, the output matrix {1 + config.mtp.depth}x; 12 S H c a block for attention"
    if config.mtp.freeze_trunk or detaches(config.mtp):
        how = "6 a matrix element and 12 S H c a block for attention where both passes run, a third of it where nothing learns"
    return f"operations: {each:.4g} FLOP a token, {step:.4g} a step, {step * total_steps(config):.4g} the run\n({how})"


def _schedules(config: Plan) -> str:
    """A simulated step under each schedule that this run could use, against ranks that share the work evenly without waiting."""
    from mtp_dist.parallel.simulation import simulated_step

    cost, parallel = costs(config), config.parallel
    if config.mtp.freeze_trunk:
        return f"schedules: none, the trunk only runs forward; the heads weigh {cost.tail_in_layers:.1f} layers"
    even = micro_batches(config) * (config.model.layers * cost.block.total + cost.tail.total) / parallel.pipeline
    rows = [["schedule", "layers of chunks", "simulated step / even split without waiting", "bubble"]]
    for schedule in SCHEDULES:
        candidate = copy.deepcopy(config)
        candidate.parallel.schedule = schedule
        if schedule != parallel.schedule:
            candidate.parallel.placement = "balanced"
        if config.train.tokens is not None:
            candidate.train.steps = None
        try:
            validate_training(candidate, None)
        except UserError:
            continue
        step = simulated_step(candidate)
        sizes = ",".join(str(len(part)) for part in layers_of_chunks(candidate))
        mark = " (chosen)" if schedule == parallel.schedule else ""
        rows.append([schedule + mark, f"[{sizes}]", f"{step.length / even:.3f}", f"{step.bubble:.1%}"])
    source = "times of parallel.costs" if parallel.costs else "by operations; measure=true takes times"
    return f"schedules: the heads weigh {cost.tail_in_layers:.1f} layers ({source})\n{_table(rows)}"


def largest_rank(config: Plan) -> int:
    """Estimated bytes of the fullest rank."""
    return max(budget.rank_memory(config, rank).total for rank in range(config.parallel.pipeline))


def smallest_layout(config: Plan) -> Plan | None:
    """The run in the fewest processes whose fullest rank fits: of these the fewest pipeline ranks, then the fewest tensor ranks.

    Sizes are powers of two; batches, model and schedule stay. None: no valid layout fits.
    """
    world, limit = 1, config.world_memory_gib * GIB
    least = _least_bytes(config)
    while world <= LARGEST_WORLD:
        for pipeline, tensor, data in _factors(world):
            if least / (pipeline * tensor) > limit:
                continue
            candidate = copy.deepcopy(config)
            parallel = candidate.parallel
            parallel.pipeline, parallel.tensor, parallel.data, parallel.placement = pipeline, tensor, data, "balanced"
            if candidate.train.tokens is not None:
                candidate.train.steps = None  # derived from the tokens before, and given only once
            candidate.launch.nodes, candidate.launch.node_rank, candidate.launch.processes_per_node = 1, 0, None
            try:
                validate_training(candidate, None)
            except UserError:
                continue
            if all(budget.rank_memory(candidate, rank).total <= limit for rank in range(pipeline)):
                return candidate
        world *= 2
    return None


def _least_bytes(config: Plan) -> int:
    """Weights and gradients that the ranks of a replica hold together, whatever the layout: the fullest rank holds the mean of it
    at least. Most layouts of a large model need not be looked at further."""
    if config.zero.stage > 1:
        return 0  # shared by replicas, too
    whole = budget.chunk_parameters(config.model, config.mtp, config.model.layers)
    trained = whole.heads if config.mtp.freeze_trunk else whole.total
    return whole.total * budget.dtype_bytes(config) + trained * budget.GRADIENT_BYTES


def _with_less_memory(config: Plan) -> tuple[str, Plan] | None:
    """Settings under which a layout fits that has none, and the layout. None: not these either."""
    for settings in REMEDIES:
        candidate = copy.deepcopy(config)
        for key, text in settings.items():
            group, name = key.split(".")
            setattr(getattr(candidate, group), name, text)
        if (found := smallest_layout(candidate)) is not None:
            return " ".join(f"{key}={str(text).lower()}" for key, text in settings.items()), found
    return None


def _factors(world: int) -> Iterator[tuple[int, int, int]]:
    """(pipeline, tensor, data) of a power of two, cheapest communication first."""
    pipeline = 1
    while pipeline <= world:
        tensor = 1
        while tensor <= min(world // pipeline, LARGEST_TENSOR):
            yield pipeline, tensor, world // pipeline // tensor
            tensor *= 2
        pipeline *= 2


def _fit(config: Plan) -> str:
    largest, limit = largest_rank(config), config.world_memory_gib
    verdict = "fits" if largest <= limit * GIB else "does not fit"
    line = f"{verdict}: the fullest rank needs about {largest / GIB:.3f} of world_memory_gib={limit:g}"
    smallest = smallest_layout(config)
    if smallest is None:
        none = f"{line}\nno layout of up to {LARGEST_WORLD} processes fits with these batches"
        less = _with_less_memory(config)
        if less is None:
            way_out = "a smaller train.micro_batch" if config.train.micro_batch > 1 else "a shorter train.sequence_length"
            return f"{none}; choose {way_out}, or give devices more memory (world_memory_gib)"
        return f"{none}; with {less[0]} this one does: {_chosen(less[1])}"
    return f"{line}\nsmallest layout that fits: {_chosen(smallest)}"


def _chosen(smallest: Plan) -> str:
    parallel = smallest.parallel
    chosen = f"parallel.pipeline={parallel.pipeline} parallel.tensor={parallel.tensor} parallel.data={parallel.data}"
    size = f"world size {world_size(parallel)}, about {largest_rank(smallest) / GIB:.3f} GiB"
    return f"{chosen} ({size})"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _range(layers: range) -> str:
    if not layers:
        return "-"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} .. {layers[-1]}"


def run(config: Plan, assumed: Sequence[str] = ()) -> int:
    """The command. ``assumed``: settings that were not given."""
    full, dataset = prepare(config)
    if assumed:
        print(f"assumed, as not given: {' '.join(assumed)}", end="\n\n")
    if full.measure:
        print(_measure(full), end="\n\n", flush=True)
    for number, part in enumerate(parts(full, dataset)):
        print(("\n" if number else "") + part, flush=True)
    return 0


def _measure(config: Plan) -> str:
    """Put this machine's times into ``parallel.costs``; returns what there is to say of them."""
    import torch

    from mtp_dist.parallel.measurement import measured_costs
    from mtp_dist.parallel.mesh import choose_device

    threads = config.launch.threads or threads_of_each(config, available_cores(), os.environ)
    torch.set_num_threads(threads)
    device = choose_device(config.launch.device)
    found = measured_costs(config, device)
    config.parallel.costs = [float(f"{1000 * part:.4g}") for work in found for part in work]
    where = f"{device.type}, {counted(threads, 'thread')}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    shown = ",".join(f"{part:g}" for part in config.parallel.costs)
    return (
        f"measured ({where}): milliseconds of a micro-batch, forward, backward, weight gradient of a block, then of the heads\n"
        f'parallel.costs="[{shown}]"'
    )


def main() -> None:
    """The command line."""
    assumed: list[str] = []

    def completed(typed: list[str]) -> Plan:
        if (planned := continued_as(Plan, "plan", typed)) is not None:
            return planned
        config, found = with_assumptions(typed)
        assumed.extend(found)
        return config

    application("plan", Plan, lambda config: run(config, assumed), examples=EXAMPLES, shortcut=completed)


if __name__ == "__main__":
    main()
