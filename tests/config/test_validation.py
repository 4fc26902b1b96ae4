"""Promise: a configuration that cannot run is refused before anything starts, in one line with the reason and the way out."""

import ast
import copy
import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from mtp_dist.config.compose import compose, differences, value
from mtp_dist.config.folder import groups
from mtp_dist.config.layout import chunks, micro_batches, processes_per_node, total_steps, world_size
from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.config.validation import validate, validate_training
from mtp_dist.errors import UserError

# model=small: 8 layers, hidden 256, 8 heads, 4 kv_heads, mlp 704.
BASE = ["model=small", "run_dir=runs/x", "data.path=data/x", "train.steps=100", "train.global_batch=32", "train.micro_batch=4"]
VOCABULARY = 4096


@cache
def with_options(*options: str) -> TrainingRun:
    return compose("train", TrainingRun, [*BASE, *options])


def composed(*overrides: str) -> TrainingRun:
    """Options of groups are composed once each; single settings are set in a copy of the result, which is fifty times as fast."""
    options = [override for override in overrides if override.partition("=")[0] in groups()]
    config = copy.deepcopy(with_options(*options))
    for override in overrides:
        key, _, text = override.partition("=")
        if override not in options:
            owner, _, name = key.rpartition(".")
            holder = value(config, owner) if owner else config
            setattr(holder, name, text if text[:1] == "[" and isinstance(getattr(holder, name), str) else yaml.safe_load(text))
    return config


BROKEN = [
    ("run_dir=''", ["run_dir is empty", "run_dir="]),
    ("data.path=''", ["data.path is empty", "build_shards"]),
    ("seed=-1", ["seed=-1"]),
    ("optim.lr=.nan", ["optim.lr=nan"]),
    ("optim.lr=.inf", ["optim.lr=inf", "from 1e-12 to 1000"]),
    ("optim.lr=0", ["optim.lr=0", "from 1e-12"]),
    ("optim.beta1=1", ["optim.beta1=1", "less than 1"]),
    ("optim.beta2=-0.1", ["optim.beta2=-0.1"]),
    ("optim.eps=0", ["optim.eps"]),
    ("optim.weight_decay=-1", ["optim.weight_decay"]),
    ("optim.clip=-1", ["optim.clip"]),
    ("model.layers=0", ["model.layers=0", "from 1 to 10000"]),
    ("model.norm_eps=0", ["model.norm_eps"]),
    ("model.rope_theta=-1", ["model.rope_theta"]),
    ("model.kv_heads=3", ["model.kv_heads=3", "model.heads=8", "1, 2, 4 or 8"]),
    ("model.hidden=250", ["model.heads=8", "model.hidden=250", "model.head_dim"]),
    ("model.head_dim=31", ["model.head_dim=31", "even"]),
    ("model.hidden=264", ["model.head_dim=33", "model.hidden=264", "even"]),
    ("model.vocab_size=100", ["model.vocab_size=100", "4096"]),
    ("parallel.pipeline=0", ["parallel.pipeline=0"]),
    ("parallel.timeout_minutes=0", ["parallel.timeout_minutes"]),
    ("parallel.tensor=3", ["parallel.tensor=3 does not divide model.heads=8; choose 1, 2, 4 or 8"]),
    (
        "parallel.tensor=4 model.heads=12 model.kv_heads=6 model.head_dim=32",
        ["parallel.tensor=4 neither divides model.kv_heads=6 nor is a multiple of it; choose 1 or 2"],
    ),
    (
        "parallel.tensor=6 model.heads=12 model.kv_heads=4 model.head_dim=32 model.mlp=720",
        ["parallel.tensor=6 neither divides model.kv_heads=4", "choose 1, 2, 4 or 12"],
    ),
    ("parallel.tensor=4 model.mlp=702", ["parallel.tensor=4", "model.mlp=702", "1 or 2"]),
    ("model.vocab_multiple=0", ["model.vocab_multiple=0", "from 1"]),
    ("parallel.pipeline=2 parallel.schedule=zbw", ["parallel.schedule=zbw", "interleaved, zbv or dualpipev", "did you mean zbv"]),
    ("parallel=v2 model.layers=2", ["model.layers=2", "4 chunks", "parallel.pipeline=2"]),
    ("parallel=v2 model.layers=3 parallel.placement=uniform", ["model.layers=3", "4 chunks"]),
    ("parallel=classic2 model.layers=1 parallel.placement=uniform", ["model.layers=1", "2 chunks"]),
    ("parallel=v2 parallel.placement=even", ["parallel.placement=even", "balanced, uniform"]),
    ("parallel=classic2 parallel.schedule=interleaved parallel.interleave=1", ["parallel.interleave=1"]),
    (
        "parallel=classic2 parallel.schedule=interleaved train.micro_batch=4 train.global_batch=20 data.lanes=4",
        ["interleaved", "5 micro-batches", "train.global_batch=16"],
    ),
    ("parallel=v2 parallel.costs=[1,2,3,-1,2,3]", ["parallel.costs=[", ": -1 must be a number from 0"]),
    ("parallel=v2 parallel.costs=[1,2]", ["parallel.costs has 2 entries", "plan measure=true"]),
    ("parallel=v2 parallel.costs=[0,0,0,1,2,3]", ["parallel.costs=[0", "block"]),
    ("parallel=v2 parallel.placement=[4,4]", ["parallel.placement=[4,4]", "2 entries", "4 chunks"]),
    ("parallel=v2 parallel.placement=[2,2,2,1]", ["[2,2,2,1]", "7 layers", "model.layers=8"]),
    ("parallel=v2 parallel.placement=[4,0,2,2]", ["[4,0,2,2]", "only the last"]),
    ("parallel=v2 parallel.placement=[4,3,2,-1]", ["[4,3,2,-1]"]),
    ("parallel.placement=[7]", ["[7]", "model.layers=8"]),
    ("train.global_batch=30", ["train.global_batch=30", "parallel.data=1 x train.micro_batch=4", "28 or 32"]),
    ("train.global_batch=4 train.micro_batch=8", ["train.global_batch=4", "choose 8"]),
    ("parallel.data=3", ["train.global_batch=32", "parallel.data=3 x train.micro_batch=4 = 12", "24 or 36"]),
    (
        "parallel.pipeline=2 parallel.schedule=dualpipev train.micro_batch=16",
        ["2 micro-batches", "dualpipev", "at least 4", "train.global_batch=64"],
    ),
    ("data.lanes=5", ["data.lanes=5", "train.global_batch=32", "1, 2, 4, 8, 16 or 32"]),
    ("data.lanes=1 parallel.data=2", ["data.lanes=1", "parallel.data=2", "2, 4, 8, 16 or 32"]),
    ("data.lanes=0", ["data.lanes=0"]),
    ("data.block_samples=0", ["data.block_samples"]),
    ("data.prefetch=-1", ["data.prefetch"]),
    ("mtp.kind=sequentiel", ["mtp.kind=sequentiel", "did you mean sequential"]),
    ("mtp.concat=embeding_first", ["mtp.concat", "did you mean embedding_first"]),
    ("mtp.h0=pre", ["mtp.h0=pre", "post_norm or pre_norm"]),
    ("mtp.recycle=x", ["mtp.recycle=x"]),
    ("mtp.normalize=avg", ["mtp.normalize=avg", "mean, sum or weights"]),
    ("mtp.kind=none", ["mtp.depth=2", "mtp.kind=none", "mtp.depth=0"]),
    ("mtp.depth=0", ["mtp.depth=0", "mtp.kind=sequential", "mtp=none"]),
    ("train.sequence_length=2", ["mtp.depth=2", "train.sequence_length=2"]),
    ("mtp.loss_weight=-1", ["mtp.loss_weight"]),
    ("mtp.depth_weights=[1]", ["mtp.depth_weights", "1 entry", "mtp.depth=2"]),
    ("mtp.depth_weights=[1,-1]", ["mtp.depth_weights"]),
    ("mtp.loss_weight_points=[[10.0,0.1],[10.0,0.2]]", ["mtp.loss_weight_points", "ascend"]),
    ("mtp.loss_weight_points=[[0.0,0.1]]", ["mtp.loss_weight_points", "ascend"]),
    ("mtp.loss_weight_points=[[10.0]]", ["mtp.loss_weight_points", "pair"]),
    ("mtp.loss_weight_points=[[10.0,-1.0]]", ["mtp.loss_weight_points"]),
    ("mtp.loss_weight_points=[[10.0,.nan]]", ["mtp.loss_weight_points"]),
    ("mtp.stride=0", ["mtp.stride=0", "from 1"]),
    ("mtp.stride=128", ["mtp.depth=2 x mtp.stride=128", "less than train.sequence_length=256"]),
    ("mtp.stride=2 mtp.targets=trunk", ["mtp.stride=2", "mtp.targets=trunk", "mtp.stride=1"]),
    ("mtp.stride=2 mtp.kind=eagle3", ["mtp.stride=2", "mtp.kind=eagle3", "mtp.stride=1"]),
    ("mtp.curriculum=[[10.0]]", ["mtp.curriculum", "pair"]),
    ("mtp.curriculum=[[-1,1]]", ["mtp.curriculum=[[-1, 1]]: -1", "from 0"]),
    ("mtp.curriculum=[[5,1],[5,2]]", ["mtp.curriculum", "5 tokens after 5", "ascend"]),
    ("mtp.curriculum=[[5,3]]", ["depth 3", "from 0 to mtp.depth=2"]),
    ("mtp.curriculum=[[5,1.5]]", ["depth 1.5", "whole number"]),
    ("mtp.freeze_trunk=true mtp.curriculum=[[5,0]]", ["depth 0", "from 1 to mtp.depth=2", "mtp.freeze_trunk"]),
    ("mtp=none mtp.curriculum=[[5,0]]", ["mtp.curriculum", "mtp.kind=none"]),
    ("mtp.loss_weight_shape=lin", ["mtp.loss_weight_shape=lin", "step or linear"]),
    ("mtp.branch=last", ["mtp.branch=last", "penultimate or final"]),
    ("mtp.adversarial=-1", ["mtp.adversarial=-1"]),
    ("mtp.adversarial=0.1", ["mtp.adversarial=0.1", "mtp.targets=trunk"]),
    ("mtp.kind=medusa mtp.targets=trunk mtp.projection=own mtp.adversarial=1", ["mtp.adversarial=1", "mtp.projection=shared"]),
    ("mtp=none mtp.targets=trunk mtp.adversarial=1", ["mtp.adversarial=1", "mtp.kind=none"]),
    ("mtp.projection=mine", ["mtp.projection=mine", "shared or own"]),
    ("mtp.kind=parallel mtp.projection=own", ["mtp.projection=own", "mtp.kind=medusa", "mtp.projection=shared"]),
    ("mtp.embedding=mine", ["mtp.embedding=mine", "shared or own"]),
    ("mtp.kind=medusa mtp.embedding=own", ["mtp.embedding=own", "sequential or notebook", "not medusa", "mtp.embedding=shared"]),
    ("mtp=none mtp.projection=own", ["mtp.projection=own", "not none", "mtp.projection=shared"]),
    ("mtp.main_loss_weight=-1", ["mtp.main_loss_weight=-1", "must be 0, or a number from"]),
    ("mtp.main_loss_weight=.nan", ["mtp.main_loss_weight=nan", "must be 0, or a number from"]),
    ("mtp.main_loss_weight_points=[[5,1],[5,2]]", ["mtp.main_loss_weight_points", "ascend"]),
    ("mtp.main_loss_weight_points=[[5,-1]]", ["mtp.main_loss_weight_points=[[5, -1]]: -1", "from 0"]),
    ("mtp=none mtp.main_loss_weight=0", ["mtp.main_loss_weight=0", "mtp.kind=none", "no loss at all"]),
    ("mtp.detach=true mtp.main_loss_weight=0", ["mtp.main_loss_weight=0", "mtp.detach=true", "freeze_trunk"]),
    ("mtp.kind=eagle mtp.main_loss_weight=0", ["mtp.main_loss_weight=0", "mtp.kind=eagle"]),
    ("mtp.freeze_trunk=true mtp.main_loss_weight=0.5", ["mtp.main_loss_weight=0.5", "mtp.freeze_trunk=true", "choose"]),
    ("mtp.scheduled_sampling=1.1", ["mtp.scheduled_sampling=1.1", "from 0 to 1"]),
    ("mtp.scheduled_sampling=-0.1", ["mtp.scheduled_sampling=-0.1", "from 0 to 1"]),
    ("mtp.scheduled_sampling_points=[[5,1.5]]", ["mtp.scheduled_sampling_points=1.5", "from 0 to 1"]),
    ("mtp.scheduled_sampling_points=[[5]]", ["mtp.scheduled_sampling_points", "pair [tokens seen, probability]"]),
    ("mtp.scheduled_sampling_shape=line", ["mtp.scheduled_sampling_shape=line", "step or linear"]),
    ("mtp.scheduled_sampling_shape=linear", ["mtp.scheduled_sampling_shape=linear", "points"]),
    ("mtp.kind=eagle mtp.scheduled_sampling=0.5", ["mtp.scheduled_sampling=0.5", "sequential or notebook", "not eagle"]),
    ("mtp.kind=parallel mtp.scheduled_sampling_points=[[5,0.5]]", ["mtp.scheduled_sampling_points", "not parallel"]),
    ("mtp=none mtp.scheduled_sampling=0.5", ["mtp.scheduled_sampling=0.5", "not none"]),
    ("mtp.targets=trunc", ["mtp.targets=trunc", "did you mean trunk"]),
    ("mtp.kind=medusa mtp.repeat=true", ["mtp.repeat=true", "mtp.kind=medusa"]),
    ("mtp.kind=eagle mtp.repeat=true", ["mtp.repeat=true", "mtp.kind=eagle", "mtp.repeat=false"]),
    ("mtp.kind=eagle3 mtp.blocks=2", ["mtp.blocks=2", "mtp.kind=eagle3", "mtp.blocks=1"]),
    ("mtp.kind=eagle3 model.layers=4 mtp.taps=[1,2,5]", ["mtp.taps=[1, 2, 5]", "5 is no", "model.layers=4", "from 0"]),
    ("mtp.kind=eagle3 mtp.taps=[3,1]", ["mtp.taps=[3, 1]", "ascend", "mtp.taps=[1, 3]"]),
    ("mtp=top mtp.depth=2", ["mtp.depth=2", "mtp.kind=top", "choose 1"]),
    ("mtp=top mtp.targets=trunk", ["mtp.targets=trunk", "mtp.kind=top", "choose tokens"]),
    ("mtp=top mtp.window=1", ["mtp.window=1", "2"]),
    ("mtp=top train.sequence_length=15", ["mtp.window=16 - 1", "train.sequence_length=15"]),
    ("mtp.kind=eagle mtp.draft_vocabulary=4097", ["mtp.draft_vocabulary=4097", "4096 tokens", "or null"]),
    ("mtp.kind=eagle3 mtp.draft_vocabulary=0", ["mtp.draft_vocabulary=0", "from 1"]),
    ("mtp.draft_vocabulary=7", ["mtp.draft_vocabulary=7", "mtp.kind=eagle", "not sequential", "mtp.draft_vocabulary=null"]),
    ("mtp.kind=eagle mtp.taps=[1]", ["mtp.taps=[1]", "mtp.kind=eagle3", "mtp.taps=[]"]),
    ("mtp.kind=eagle mtp.cross_entropy_weight=-1", ["mtp.cross_entropy_weight=-1", "must be 0, or"]),
    ("mtp.kind=sequential mtp.match_parameters=true", ["mtp.match_parameters", "mtp.kind=parallel"]),
    ("mtp.kind=parallel mtp.match_parameters=true model.layers=2", ["mtp.match_parameters", "model.layers=2", "model.layers=3"]),
    ("mtp.blocks=0", ["mtp.blocks=0", "from 1"]),
    ("mtp.decay=0", ["mtp.decay=0"]),
    ("mtp.decay=0.5 mtp.depth_weights=[1,1]", ["mtp.decay=0.5", "mtp.depth_weights"]),
    ("mtp.normalize=weights mtp.depth_weights=[0,0]", ["mtp.normalize=weights", "mean or sum"]),
    ("train.steps=null", ["train.steps and train.tokens", "both null"]),
    ("train.tokens=1000", ["train.steps and train.tokens", "both given"]),
    ("train.steps=0", ["train.steps=0"]),
    ("train.dtype=float16", ["train.dtype=float16", "bfloat16 or float32"]),
    ("train.compile=true train.recompute=selective", ["train.compile=true", "train.recompute=selective", "full or none"]),
    ("train.attention=flash", ["train.attention=flash", "auto, causal, masked, varlen or flex"]),
    ("train.attention=causal", ["train.attention=causal", "across documents", "model.document_mask=false", "auto (masked or"]),
    ("train.attention=masked model.document_mask=false", ["model.document_mask=false", "train.attention=auto (causal)"]),
    ("train.attention=varlen train.dtype=float32", ["bfloat16", "train.dtype=float32", "auto (masked or flex)"]),
    ("train.attention=varlen launch.device=cpu", ["train.attention=varlen", "CUDA only", "auto (masked)"]),
    ("train.attention=varlen model.head_dim=36", ["a multiple of 8, up to 256, not 36"]),
    ("train.attention=flex launch.device=cpu", ["train.attention=flex", "no backward pass on CPU", "auto (masked)"]),
    ("train.attention=flex train.recompute=selective", ["train.recompute=selective", "auto (masked or varlen)"]),
    ("train.attention=flex model.head_dim=8", ["width 16 or more, not 8"]),
    ("train.nonfinite=skipp", ["train.nonfinite=skipp", "did you mean skip"]),
    ("train.nonfinite_limit=0", ["train.nonfinite_limit"]),
    ("train.log_every_steps=0", ["train.log_every_steps"]),
    ("zero.stage=4", ["zero.stage=4", "from 0 to 3"]),
    ("zero.stage=2 parallel=v2", ["zero.stage=2", "gradients", "every backward", "zero.stage=1"]),
    ("zero.stage=3 parallel=classic2", ["zero.stage=3", "parameters", "every backward", "zero.stage=1"]),
    ("zero.stage=3", ["zero.stage=3", "parallel.data=1", "zero.stage=1"]),
    ("zero.stage=3 parallel.data=2 train.recompute=selective", ["zero.stage=3", "train.recompute=selective", "full or none"]),
    ("zero.stage=3 parallel.data=2 train.compile=true", ["zero.stage=3", "train.compile=true", "zero.stage=2"]),
    ("zero.offload=true zero.stage=0 train.dtype=float32", ["zero.offload=true", "zero.stage=0", "zero.stage=1"]),
    ("mtp.freeze_trunk=true mtp=none", ["mtp.freeze_trunk=true", "mtp.depth=0", "nothing to train"]),
    ("optim.head_lr_ratio=0", ["optim.head_lr_ratio=0", "from 1e-6"]),
    ("zero.stage=0", ["train.dtype=bfloat16", "phantom Adam step", "zero.stage=1", "float32"]),
    ("zero.reduce_bucket_size=0", ["zero.reduce_bucket_size"]),
    ("schedule.kind=linear", ["schedule.kind=linear", "cosine, wsd or constant"]),
    ("schedule.min_ratio=1.1", ["schedule.min_ratio"]),
    ("schedule.warmup_tokens=-1", ["schedule.warmup_tokens"]),
    ("schedule.warmup_tokens=819200", ["schedule.warmup_tokens=819200", "819200 tokens", "100 steps"]),
    ("schedule=wsd schedule.warmup_tokens=500000 schedule.decay_tokens=400000", ["500000", "400000", "819200"]),
    ("launch.device=gpu", ["launch.device=gpu", "auto, cpu or cuda"]),
    ("launch.nodes=2", ["launch.nodes=2", "= 1", "choose 1"]),
    ("parallel.data=4 launch.nodes=2 launch.processes_per_node=4", ["processes_per_node=4", "launch.processes_per_node=2"]),
    ("launch.node_rank=1", ["launch.node_rank=1", "launch.nodes=1"]),
    ("init.heads=fresh", ["init.heads=fresh", "init.checkpoint=RUN_FOLDER"]),
    ("init.optimizer=true", ["init.optimizer=true", "init.checkpoint=RUN_FOLDER"]),
    ("launch.master_port=70000", ["launch.master_port"]),
    ("launch.threads=-1", ["launch.threads"]),
    ("tracker.wandb=of", ["tracker.wandb=of", "offline, online or disabled"]),
    ("tokenizer.kind=bp", ["tokenizer.kind=bp", "did you mean bpe"]),
    ("validation.every_steps=-1", ["validation.every_steps"]),
    ("validation.sequences=0", ["validation.sequences"]),
    ("checkpoint.keep_last=-1", ["checkpoint.keep_last"]),
]


@pytest.mark.parametrize(("overrides", "words"), BROKEN, ids=[overrides for overrides, _ in BROKEN])
def test_a_broken_rule_is_one_line_with_the_reason_and_the_way_out(overrides: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate(composed(*overrides.split(" ")), VOCABULARY)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


FITTING = [
    "",
    "parallel=v2",
    "parallel=classic2",
    "parallel=tensor2",
    "parallel=data2",
    "parallel=v2_tensor2",
    "parallel=v2_data2",
    "parallel=v2 train.micro_batch=32",
    "parallel=classic2 train.micro_batch=32",
    "parallel=classic2 parallel.schedule=interleaved train.micro_batch=32",
    "parallel.pipeline=4 parallel.schedule=1f1b train.micro_batch=16",
    "parallel.tensor=8",
    "parallel.tensor=8 model.kv_heads=1 parallel.sequence_parallel=true",
    "parallel=v2 parallel.placement=[3,3,2,0]",
    "parallel.pipeline=2 parallel.schedule=dualpipev",
    "parallel.schedule=anything",
    "parallel.tensor=2 model.vocab_size=4097",
    "parallel.tensor=2 model.vocab_multiple=97",
    "zero.stage=0 train.dtype=float32",
    "train.attention=varlen",
    "train.attention=flex train.dtype=float32 launch.device=cuda",
    "train.attention=masked launch.device=cpu",
    "train.attention=causal model.document_mask=false",
    "mtp=none",
    "mtp=deepseek_v3",
    "mtp=fastmtp",
    "mtp=gloeckle_n4",
    "mtp=gloeckle_bytes_n8",
    "mtp=medusa1",
    "mtp=medusa2",
    "mtp=koala",
    "mtp=top",
    "train.steps=null train.tokens=1000000",
    "schedule=wsd schedule.warmup_tokens=400000 schedule.decay_tokens=419200",
    "parallel.data=4 launch.nodes=2 launch.node_rank=1",
    "optim.clip=0",
    "model.head_dim=48",
    "experiment=quickstart",
]


@pytest.mark.parametrize("overrides", FITTING)
def test_what_fits_is_accepted(overrides: str) -> None:
    validate(composed(*overrides.split()), VOCABULARY)


@pytest.mark.parametrize("parallel", groups()["parallel"])
def test_every_model_of_conf_fits_every_layout_of_conf(parallel: str) -> None:
    config = composed(f"parallel={parallel}")
    for name in groups()["model"]:
        model = composed(f"model={name}").model
        validate(replace(config, model=model), model.vocab_size or 128256)


def test_every_tensor_rank_needs_a_row_of_the_vocabulary() -> None:
    config = composed("parallel.tensor=4", "model.vocab_size=3")
    with pytest.raises(UserError, match=r"parallel\.tensor=4 is more than model\.vocab_size=3"):
        validate_training(config, None)


def test_a_plan_needs_no_run_folder_and_no_dataset() -> None:
    config = composed("run_dir=''", "data.path=''")
    validate_training(config, None)
    with pytest.raises(UserError, match="run_dir"):
        validate(config, None)


@pytest.mark.parametrize(
    ("parallel", "world", "parts"),
    [
        (ParallelConfig(), 1, 1),
        (ParallelConfig(pipeline=4, schedule="1f1b"), 4, 4),
        (ParallelConfig(pipeline=4, schedule="zbv"), 4, 8),
        (ParallelConfig(pipeline=2, schedule="dualpipev", data=3, tensor=2), 12, 4),
        (ParallelConfig(pipeline=1, schedule="dualpipev", data=3), 3, 1),
    ],
)
def test_a_v_placement_has_two_chunks_a_pipeline_rank(parallel: ParallelConfig, world: int, parts: int) -> None:
    assert (world_size(parallel), chunks(parallel)) == (world, parts)


def test_blocks_of_parallel_heads_are_taken_out_of_the_trunk_once() -> None:
    full = resolve(composed("mtp=gloeckle_n4"), VOCABULARY)
    assert (full.model.layers, full.mtp.match_parameters) == (5, False)
    assert resolve(full, VOCABULARY) == full
    with pytest.raises(UserError, match=r"parallel\.placement=\[4,4\] adds up to 8 layers, but model\.layers=5"):
        validate(composed("mtp=gloeckle_n4", "parallel=classic2", "parallel.placement=[4,4]"), VOCABULARY)


def test_too_few_layers_speak_of_blocks_taken_out_only_where_some_are() -> None:
    split = ("parallel.pipeline=8", "parallel.schedule=1f1b")
    with pytest.raises(UserError, match=r"^model\.layers=5 \(what mtp\.match_parameters=true leaves of 8\) is too few"):
        validate(composed("mtp=gloeckle_n4", *split), VOCABULARY)
    with pytest.raises(UserError, match=r"^model\.layers=5 is too few for 8 chunks of [^()]*: they need 7; choose"):
        validate(composed("model.layers=5", *split), VOCABULARY)


def test_derived_settings_are_filled_and_nothing_else() -> None:
    config = composed("train.steps=null", "train.tokens=100001", "schedule=wsd", "parallel.data=2", "launch.nodes=2")
    full = resolve(config, VOCABULARY)
    # 32 sequences of 256 positions a step: 100001 tokens are 12.2 steps, rounded up; a fifth of 13 steps' tokens decays.
    assert differences(config, full) == [
        ("model.vocab_size", None, 4096),
        ("model.head_dim", None, 32),
        ("schedule.decay_tokens", None, 13 * 32 * 256 // 5),
        ("train.steps", None, 13),
        ("launch.processes_per_node", None, 1),
    ]
    assert total_steps(full) == 13
    assert micro_batches(full) == 4
    assert processes_per_node(full) == 1
    assert resolve(composed("model.vocab_multiple=1000"), VOCABULARY).model.vocab_size == 5000
    assert resolve(composed("model.vocab_multiple=4096"), VOCABULARY).model.vocab_size == 4096
    assert resolve(composed("model.vocab_multiple=7", "model.vocab_size=5000"), VOCABULARY).model.vocab_size == 5000
    given = composed("model.vocab_size=5000", "model.head_dim=64")
    assert resolve(given, VOCABULARY).model == given.model


def test_the_schedules_micro_batch_limits_are_those_of_torch() -> None:
    """The rule repeats torch's own refusals, but for 1F1B's, whose loop needs none; this fails when a new torch changes them."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    source = (Path(torch.origin).parent / "distributed" / "pipelining" / "schedules.py").read_text()
    found = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    classes = {node.name: ast.get_source_segment(source, node) or "" for node in found}
    assert classes["Schedule1F1B"].count("n_microbatches < self._num_stages") == 1
    ahead = "min(self._n_microbatches,self._num_stages-self._stage.stage_index,)"
    assert ahead in "".join(classes["Schedule1F1B"].split())
    assert "n_microbatches < self._num_stages" in classes["ScheduleDualPipeV"]
    assert "n_microbatches <" not in classes["ScheduleZBVZeroBubble"]
    assert "max(2 * self.pp_group_size - 1, self._n_microbatches)" in classes["ScheduleZBVZeroBubble"]
