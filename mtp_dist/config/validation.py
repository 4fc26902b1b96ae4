"""The rules that need more than one setting, checked once, before anything expensive.

``validate`` raises UserError at the first broken rule; it is pure. A rule that is torch's or DeepSpeed's own says so,
since it may fall when they change.
"""

import math

from mtp_dist.config.attention import BACKENDS, require
from mtp_dist.config.compose import settings, value
from mtp_dist.config.heads_validation import validate_mtp
from mtp_dist.config.layout import (
    SCHEDULES,
    chunks,
    fewest_micro_batches,
    micro_batches,
    placement_by_hand,
    tokens_per_step,
    total_steps,
    world_size,
)
from mtp_dist.config.resolution import head_dim, matched, vocabulary_rows
from mtp_dist.config.rules import above, alternatives, at_least, between, divisors, finite, given, one_of
from mtp_dist.config.schema import LaunchConfig, ModelConfig, ParallelConfig, TrainingRun
from mtp_dist.errors import UserError


def validate(config: TrainingRun, vocabulary: int | None) -> None:
    """Raise UserError at the first rule that the configuration breaks; ``vocabulary`` as in ``validate_training``."""
    given("run_dir", config.run_dir, "runs/NAME")
    given("data.path", config.data.path, "FOLDER (made by data/build_shards.py)")
    validate_training(config, vocabulary)


def validate_training(config: TrainingRun, vocabulary: int | None) -> None:
    """Every rule but those on places: what a plan needs, which has no run folder and no dataset.

    ``vocabulary``: entries of the dataset's tokenizer, or None while no dataset is known; then ``model.vocab_size`` stands alone.
    """
    taken, config = config.model.layers, matched(config)
    taken -= config.model.layers
    for key, kind in settings(type(config)).items():
        if kind is float:
            finite(key, value(config, key))
    between("seed", config.seed, 0, 2**63 - 1)
    validate_model(config.model, vocabulary)
    validate_parallel(config.parallel, config.model, vocabulary, taken)
    validate_launch(config.launch, config.parallel)
    validate_mtp(config.mtp, config.model, vocabulary or config.model.vocab_size, config.train.sequence_length)
    _validate_zero(config)
    _validate_attention(config)
    _validate_optimizer(config)
    _validate_loop(config)
    _validate_batches(config)
    _validate_lanes(config)
    _validate_lengths(config)
    validate_sequence_parallel(config.parallel, config.train.sequence_length)
    _validate_intervals(config)
    one_of("init.heads", config.init.heads, ["keep", "fresh"])
    for key, asked in (("init.heads=fresh", config.init.heads == "fresh"), ("init.optimizer=true", config.init.optimizer)):
        if asked and not config.init.checkpoint:
            raise UserError(f"{key} without init.checkpoint has nothing to take; give init.checkpoint=RUN_FOLDER or leave it out")
    one_of("tracker.wandb", config.tracker.wandb, ["offline", "online", "disabled"])
    one_of("tokenizer.kind", config.tokenizer.kind, ["bpe", "bytes", "file"])


def validate_model(model: ModelConfig, vocabulary: int | None) -> None:
    """Rules inside the trunk."""
    for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "head_dim", "vocab_size", "vocab_multiple"):
        at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("norm_eps", "rope_theta", "init_std"):
        above(f"model.{name}", getattr(model, name), 0)
    if model.heads % model.kv_heads:
        choices = alternatives(divisors(model.heads))
        raise UserError(f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; choose {choices}")
    if model.head_dim is None and model.hidden % model.heads:
        fitting = [number for number in divisors(model.hidden) if number % model.kv_heads == 0]
        way_out = f"choose {alternatives(fitting)}, or set model.head_dim" if fitting else "set model.head_dim"
        raise UserError(f"model.heads={model.heads} does not divide model.hidden={model.hidden}; {way_out}")
    if head_dim(model) % 2:
        origin = "" if model.head_dim is not None else f" (model.hidden={model.hidden} / model.heads={model.heads})"
        raise UserError(f"model.head_dim={head_dim(model)}{origin} is odd; rotary embeddings turn pairs: choose an even width")
    if vocabulary is not None and model.vocab_size is not None and model.vocab_size < vocabulary:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is less than the {vocabulary} entries of the dataset's tokenizer; "
            f"choose {vocabulary} or more, or null"
        )


def validate_parallel(parallel: ParallelConfig, model: ModelConfig, vocabulary: int | None, taken: int = 0) -> None:
    """Whether a layout fits a trunk, out of which ``mtp.match_parameters`` has taken so many blocks."""
    for name in ("pipeline", "tensor", "data"):
        at_least(f"parallel.{name}", getattr(parallel, name), 1)
    above("parallel.timeout_minutes", parallel.timeout_minutes, 0)
    if parallel.pipeline > 1:
        # One process has no pipeline, so there the schedule means nothing and may stay what it was.
        one_of("parallel.schedule", parallel.schedule, SCHEDULES)
    _validate_tensor(parallel.tensor, model, vocabulary)
    _validate_placement(parallel, model, taken)


def validate_launch(launch: LaunchConfig, parallel: ParallelConfig) -> None:
    """Whether nodes and processes make the world size."""
    one_of("launch.device", launch.device, ["auto", "cpu", "cuda"])
    at_least("launch.nodes", launch.nodes, 1)
    at_least("launch.processes_per_node", launch.processes_per_node, 1)
    at_least("launch.threads", launch.threads, 0)
    between("launch.master_port", launch.master_port, 0, 65535)
    if not 0 <= launch.node_rank < launch.nodes:
        raise UserError(f"launch.node_rank={launch.node_rank} is not one of launch.nodes={launch.nodes} nodes, counted from 0")
    at_least("launch.signal_seconds", launch.signal_seconds, 0)
    at_least("launch.max_restarts", launch.max_restarts, 0)
    at_least("launch.gpus_per_node", launch.gpus_per_node, 0)
    at_least("launch.cpus_per_task", launch.cpus_per_task, 1)
    world = world_size(parallel)
    sizes = f"parallel.pipeline x data x tensor = {parallel.pipeline} x {parallel.data} x {parallel.tensor} = {world}"
    if world % launch.nodes:
        raise UserError(f"launch.nodes={launch.nodes} does not divide {sizes}; choose {alternatives(divisors(world))}")
    if launch.processes_per_node is not None and launch.nodes * launch.processes_per_node != world:
        raise UserError(
            f"launch.nodes={launch.nodes} x launch.processes_per_node={launch.processes_per_node} is not {sizes}; "
            f"choose launch.processes_per_node={world // launch.nodes} or null"
        )


def _validate_tensor(tensor: int, model: ModelConfig, vocabulary: int | None) -> None:
    def shares_keys(ranks: int) -> bool:
        return model.kv_heads % ranks == 0 or ranks % model.kv_heads == 0

    choices = alternatives(ranks for ranks in divisors(math.gcd(model.heads, model.mlp)) if shares_keys(ranks))
    for name in ("heads", "mlp"):
        size = getattr(model, name)
        if size % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide model.{name}={size}; choose {choices}")
    if not shares_keys(tensor):
        raise UserError(
            f"parallel.tensor={tensor} neither divides model.kv_heads={model.kv_heads} nor is a multiple of it; choose {choices}"
        )
    rows = vocabulary_rows(model, vocabulary)
    if rows is not None and rows < tensor:
        raise UserError(f"parallel.tensor={tensor} is more than model.vocab_size={rows}: each rank needs a row of it")


def validate_sequence_parallel(parallel: ParallelConfig, length: int) -> None:
    """Whether tensor ranks can share the positions of rows of ``length``."""
    tensor = parallel.tensor
    if parallel.sequence_parallel and length % tensor:
        raise UserError(
            f"parallel.sequence_parallel=true: parallel.tensor={tensor} does not divide train.sequence_length={length}; "
            f"choose train.sequence_length={length // tensor * tensor or tensor}, or parallel.sequence_parallel=false"
        )


def _validate_placement(parallel: ParallelConfig, model: ModelConfig, taken: int) -> None:
    if parallel.schedule == "interleaved":
        at_least("parallel.interleave", parallel.interleave, 2)
    _validate_costs(parallel.costs)
    parts = chunks(parallel)
    layout = f"parallel.pipeline={parallel.pipeline} with parallel.schedule={parallel.schedule}"
    shown, layers = parallel.placement, f"model.layers={model.layers}"
    if taken:
        layers += f" (what mtp.match_parameters=true leaves of {model.layers + taken})"
    if shown in ("balanced", "uniform"):
        # The last chunk may be the heads alone.
        needed = parts if shown == "uniform" or parts == 1 else parts - 1
        if model.layers < needed:
            raise UserError(
                f"{layers} is too few for the {parts} chunks of {layout}: they need {needed}; choose more layers, fewer "
                "pipeline ranks, or parallel.schedule=1f1b"
            )
        return
    try:
        sizes = placement_by_hand(shown)
    except ValueError:
        raise UserError(f"parallel.placement={shown}: choose balanced, uniform, or a list of layers such as [3,2,2,1]") from None
    if len(sizes) != parts:
        raise UserError(f"parallel.placement={shown} has {len(sizes)} entries; {layout} has {parts} chunks")
    if min(sizes[:-1], default=1) < 1 or sizes[-1] < 0:
        raise UserError(f"parallel.placement={shown}: every chunk needs a layer, only the last one (it has the heads) may have 0")
    if sum(sizes) != model.layers:
        raise UserError(f"parallel.placement={shown} adds up to {sum(sizes)} layers, but {layers}")


def _validate_costs(costs: list[float]) -> None:
    if costs and len(costs) != 6:
        raise UserError(
            f"parallel.costs has {len(costs)} entries, not 6 (forward, backward, weight gradient of a block, then of the "
            "heads); python -m mtp_dist.plan measure=true prints them, [] counts operations"
        )
    for cost in costs:
        finite("parallel.costs", cost)
        at_least("parallel.costs", cost, 0)
    if costs and not costs[0]:
        raise UserError(f"parallel.costs={costs}: the first, a block's forward pass, is 0")


def _validate_zero(config: TrainingRun) -> None:
    stage = config.zero.stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={stage} is not one of 0, 1, 2 or 3")
    at_least("zero.reduce_bucket_size", config.zero.reduce_bucket_size, 1)
    at_least("zero.allgather_bucket_size", config.zero.allgather_bucket_size, 1)
    if stage >= 2 and config.parallel.pipeline > 1:
        part = "gradients" if stage == 2 else "parameters"
        raise UserError(
            f"zero.stage={stage} shards {part} during every backward, which a pipeline interleaves over micro-batches; "
            f"with parallel.pipeline={config.parallel.pipeline} choose zero.stage=1 (or 0)"
        )
    if config.zero.offload and stage == 0:
        raise UserError("zero.offload=true with zero.stage=0: it is ZeRO that moves the optimizer; choose zero.stage=1")
    if stage == 3 and config.parallel.data == 1:
        raise UserError("zero.stage=3 with parallel.data=1 has no replicas to shard weights over; choose zero.stage=1")
    one_of("train.recompute", config.train.recompute, ["none", "selective", "full"])
    if stage == 3 and config.train.recompute == "selective":
        raise UserError(
            "zero.stage=3 gathers weights inside the blocks that train.recompute=selective runs again, and torch takes the "
            "collectives for operations of the block; choose train.recompute=full or none"
        )
    if stage == 3 and config.train.compile:
        raise UserError(
            "zero.stage=3 gathers weights in hooks inside the blocks that train.compile=true compiles, which torch cannot trace; "
            "choose zero.stage=2, or train.compile=false"
        )
    if config.train.compile and config.train.recompute == "selective":
        raise UserError(
            "train.compile=true with train.recompute=selective: compiled blocks hide the operations that it selects; "
            "choose train.recompute=full or none, or train.compile=false"
        )
    one_of("train.dtype", config.train.dtype, ["bfloat16", "float32"])
    if config.train.dtype == "bfloat16" and stage == 0:
        raise UserError(
            "train.dtype=bfloat16 with zero.stage=0: DeepSpeed's bf16 optimizer without ZeRO takes a phantom Adam step at start; "
            "choose zero.stage=1 (or train.dtype=float32)"
        )


def _validate_attention(config: TrainingRun) -> None:
    one_of("train.attention", config.train.attention, ["auto", *BACKENDS])
    device = config.launch.device
    require(config.model, config.train, None if device == "auto" else device)


def _validate_optimizer(config: TrainingRun) -> None:
    optim, schedule = config.optim, config.schedule
    above("optim.lr", optim.lr, 0)
    above("optim.head_lr_ratio", optim.head_lr_ratio, 0)
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            raise UserError(f"optim.{name}={beta} must be at least 0 and less than 1")
    above("optim.eps", optim.eps, 0)
    at_least("optim.weight_decay", optim.weight_decay, 0)
    at_least("optim.clip", optim.clip, 0)
    one_of("schedule.kind", schedule.kind, ["cosine", "wsd", "constant"])
    at_least("schedule.warmup_tokens", schedule.warmup_tokens, 0)
    at_least("schedule.decay_tokens", schedule.decay_tokens, 1)
    between("schedule.min_ratio", schedule.min_ratio, 0, 1)


def _validate_loop(config: TrainingRun) -> None:
    train = config.train
    for name in ("global_batch", "micro_batch", "sequence_length", "steps", "tokens", "nonfinite_limit", "log_every_steps"):
        at_least(f"train.{name}", getattr(train, name), 1)
    one_of("train.nonfinite", train.nonfinite, ["stop", "skip"])
    if (train.steps is None) == (train.tokens is None):
        have = "are both given" if train.steps is not None else "are both null"
        raise UserError(f"train.steps and train.tokens {have}; give one of them, e.g. train.steps=1000")


def _validate_batches(config: TrainingRun) -> None:
    batch, micro, replicas = config.train.global_batch, config.train.micro_batch, config.parallel.data
    unit = replicas * micro
    product = f"parallel.data={replicas} x train.micro_batch={micro}"
    if batch % unit:
        near = [size for size in (batch // unit * unit, -(-batch // unit) * unit) if size]
        raise UserError(f"train.global_batch={batch} is not a multiple of {product} = {unit}; choose {alternatives(near)}")
    parallel, least = config.parallel, fewest_micro_batches(config.parallel)
    if micro_batches(config) < least:
        raise UserError(
            f"train.global_batch={batch} / ({product}) = {micro_batches(config)} micro-batches, but "
            f"parallel.schedule={parallel.schedule} with parallel.pipeline={parallel.pipeline} needs at least {least}; "
            f"choose train.global_batch={unit * least} or more, or a smaller train.micro_batch"
        )
    count, ranks = micro_batches(config), parallel.pipeline
    if ranks > 1 and parallel.schedule == "interleaved" and count % max(1, count // ranks):
        raise UserError(
            f"parallel.schedule=interleaved with parallel.pipeline={ranks} cannot run {count} micro-batches in equal rounds; "
            f"choose train.global_batch={unit * (count // ranks) * ranks}"
        )


def _validate_lanes(config: TrainingRun) -> None:
    data, replicas, batch = config.data, config.parallel.data, config.train.global_batch
    at_least("data.lanes", data.lanes, 1)
    at_least("data.block_samples", data.block_samples, 1)
    at_least("data.prefetch", data.prefetch, 0)
    choices = alternatives(number for number in divisors(batch) if number % replicas == 0)
    if batch % data.lanes:
        raise UserError(f"data.lanes={data.lanes} does not divide train.global_batch={batch}; choose {choices}")
    if data.lanes % replicas:
        raise UserError(f"data.lanes={data.lanes} is not a multiple of parallel.data={replicas}; choose {choices}")


def _validate_lengths(config: TrainingRun) -> None:
    steps, schedule = total_steps(config), config.schedule
    tokens = steps * tokens_per_step(config)
    run = f"the {tokens} tokens of the run ({steps} steps of {tokens_per_step(config)})"
    if schedule.warmup_tokens >= tokens:
        raise UserError(f"schedule.warmup_tokens={schedule.warmup_tokens} must be less than {run}")
    if schedule.kind == "wsd" and schedule.decay_tokens is not None and schedule.warmup_tokens + schedule.decay_tokens > tokens:
        raise UserError(
            f"schedule.warmup_tokens={schedule.warmup_tokens} and schedule.decay_tokens={schedule.decay_tokens} "
            f"are together more than {run}"
        )


def _validate_intervals(config: TrainingRun) -> None:
    for key in (
        "train.log_every_minutes",
        "validation.every_steps",
        "validation.every_minutes",
        "checkpoint.every_steps",
        "checkpoint.every_minutes",
        "checkpoint.keep_last",
        "checkpoint.keep_every_steps",
    ):
        at_least(key, value(config, key), 0)
    at_least("validation.sequences", config.validation.sequences, 1)
    _validate_sample(config)


def _validate_sample(config: TrainingRun) -> None:
    at_least("validation.prompt_tokens", config.validation.prompt_tokens, 1)
    obstacles = {
        "parallel.sequence_parallel=true shares positions, and a decoder's pass may have one": config.parallel.sequence_parallel,
        "zero.stage=3 gathers weights for training alone": config.zero.stage == 3,
        "train.compile=true compiles blocks for training alone": config.train.compile,
    }
    for reason, there in obstacles.items():
        if config.validation.prompt and there:
            raise UserError(f"validation.prompt cannot be continued: {reason}; leave validation.prompt empty")
