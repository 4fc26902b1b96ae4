"""Promise: the plan's parameters and operations are those of the model that would be built; its problems those of training."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_dist.config.compose import compose
from mtp_dist.config.folder import groups
from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import Plan, TrainingRun
from mtp_dist.config.validation import validate
from mtp_dist.errors import UserError
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import initialize
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients
from mtp_dist.parallel import budget
from mtp_dist.parallel.stages import build_chunks, global_parameters
from mtp_dist.plan import GIB, largest_rank, prepare, run, smallest_layout, text, with_assumptions


def planned(*overrides: str) -> Plan:
    return prepare(compose("plan", Plan, ["train.steps=10", "model.vocab_size=1024", *overrides]))[0]


def owned(names: dict[str, int]) -> budget.Parameters:
    """Elements by the first part of their names."""
    sums = {"layers": 0, "norm": 0, "embedding": 0, "mtp": 0, "adversary": 0, "head": 0}
    for name, count in names.items():
        sums[name.partition(".")[0]] += count
    return budget.Parameters(sums["layers"] + sums["norm"], sums["embedding"], sums["mtp"] + sums["adversary"], sums["head"])


@pytest.mark.parametrize("preset", groups()["model"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_parameters_are_those_of_the_model(preset: str, depth: int) -> None:
    kind = "sequential" if depth else "none"
    config = planned(f"model={preset}", f"mtp.depth={depth}", f"mtp.kind={kind}", "model.vocab_size=1000")
    with torch.device("meta"):
        model = Chunk(config.model, config.mtp, range(config.model.layers))
    names = {name: p.numel() for name, p in model.named_parameters()}
    assert budget.chunk_parameters(config.model, config.mtp, config.model.layers) == owned(names)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "published"),
    [
        ("1b", 128_256, 1_235_814_400),
        ("3b", 128_256, 3_212_749_824),
        ("llama2_7b", 32_000, 6_738_415_616),
        ("llama3_8b", 128_256, 8_030_261_248),
        ("llama3_70b", 128_256, 70_553_706_496),
        ("llama3_405b", 128_256, 405_853_388_800),
    ],
)
def test_parameters_are_the_published_ones(preset: str, vocabulary: int, published: int) -> None:
    """Elements of the released weights of Llama 3.2 1B and 3B, Llama 2 7B, Llama 3 8B and 70B, Llama 3.1 405B."""
    config = planned(f"model={preset}", f"model.vocab_size={vocabulary}", "mtp=none")
    assert budget.chunk_parameters(config.model, config.mtp, config.model.layers).total == published


@pytest.mark.parametrize(
    ("preset", "vocabulary", "about"),
    [("5m", 4096, 5e6), ("25m", 4096, 25e6), ("125m", 50_257, 125e6), ("350m", 50_257, 350e6)],
)
def test_small_presets_are_as_large_as_their_name(preset: str, vocabulary: int, about: float) -> None:
    config = planned(f"model={preset}", f"model.vocab_size={vocabulary}", "mtp=none")
    assert budget.chunk_parameters(config.model, config.mtp, config.model.layers).total == pytest.approx(about, rel=0.1)


HEADS = [
    "mtp.depth=2",
    "mtp.repeat=true mtp.depth=3",
    "mtp.blocks=2",
    "mtp.detach=true",
    "mtp.kind=parallel",
    "mtp.kind=parallel mtp.branch=final mtp.blocks=2",
    "mtp.kind=medusa mtp.blocks=3",
    "mtp.kind=medusa mtp.projection=own",
    "mtp.targets=trunk mtp.adversarial=0.1 mtp.depth=3",
    "mtp.kind=notebook mtp.blocks=2",
    "mtp.kind=eagle mtp.blocks=2",
    "mtp.kind=eagle mtp.h0=pre_norm mtp.depth=1 mtp.targets=trunk",
    "mtp.kind=eagle3 mtp.depth=3",
    "mtp.kind=eagle3 mtp.taps=[1] mtp.detach=true mtp.depth=4",
    "mtp.kind=eagle mtp.draft_vocabulary=300 mtp.targets=trunk",
    "mtp=top",
]
"""One of each kind and option, at a depth above 1."""


@pytest.mark.parametrize("tie", ["true", "false"])
@pytest.mark.parametrize("heads", ["mtp=none", *HEADS])
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.pipeline=1", "parallel.tensor=2"],
        ["parallel.pipeline=2", "parallel.schedule=zbv"],
        ["parallel.pipeline=2", "parallel.schedule=1f1b", "parallel.tensor=2"],
        ["parallel.pipeline=2", "parallel.schedule=1f1b", "parallel.tensor=4", "model.kv_heads=1"],
        ["parallel.pipeline=4", "parallel.schedule=dualpipev", "model.layers=8"],
        ["parallel.pipeline=2", "parallel.schedule=zbv", "parallel.placement=[2,1,1,0]"],
        ["parallel.pipeline=4", "parallel.schedule=1f1b", "parallel.placement=[2,1,1,0]"],
    ],
)
def test_parameters_of_each_rank_are_those_that_it_builds(layout: list[str], tie: str, heads: str) -> None:
    config = planned(*layout, *heads.split(), f"model.tie_embeddings={tie}", "train.global_batch=64")
    for rank in range(config.parallel.pipeline):
        place: Any = SimpleNamespace(
            parallel=config.parallel, pipeline_rank=rank, tensor=TensorGroup(0, config.parallel.tensor, None)
        )
        built = global_parameters(build_chunks(config, place))
        expected = owned({name: p.numel() for name, p in built.items()})
        assert budget.rank_parameters(config, rank) == expected


def materialized(config: Plan) -> tuple[Chunk, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        drafted = range(config.mtp.draft_vocabulary or 0)
        model = Chunk(config.model, config.mtp, range(config.model.layers), draft_tokens=drafted)
    initialize(model, 0)
    model.defer_weight_gradients(WeightGradients())
    width = config.train.sequence_length + 1 + lookahead(config.mtp)
    tokens = torch.randint(0, 1024, (config.train.micro_batch, width), generator=torch.Generator().manual_seed(0))
    documents, scale = torch.zeros_like(tokens).int(), torch.ones(len(tokens), 1 + config.mtp.depth)
    return model, {"tokens": tokens, "documents": documents, "scale": scale}


SMALL = ("train.dtype=float32", "train.micro_batch=2", "train.sequence_length=32")


@pytest.mark.parametrize("heads", HEADS)
def test_operations_are_those_that_torch_counts(heads: str) -> None:
    """Torch counts every matrix product exactly, but not the CPU's fused attention: its share is the documented formula."""
    config = planned(*SMALL, *heads.split())
    model, rows = materialized(config)
    with FlopCounterMode(display=False) as counter:
        model(**rows)[0].backward()
        assert model.weight_gradients is not None
        model.weight_gradients.take()()
    positions = config.train.micro_batch * config.train.sequence_length
    blocks = 0 if config.mtp.kind in ("medusa", "notebook", "top") else config.mtp.blocks * config.mtp.depth
    if config.mtp.kind == "eagle3":
        blocks = config.mtp.depth * (config.mtp.depth + 1) // 2  # step s attends to s + 1 times the entries
    attention = 12 * (config.model.layers + blocks) * config.train.sequence_length * config.model.hidden
    assert counter.get_total_flops() / positions + attention == budget.flops_per_token(config)


@pytest.mark.parametrize(
    "override", ["mtp=none", "mtp.depth=1", "model=small", "train.sequence_length=128", "model.document_mask=false", *HEADS]
)
def test_activations_are_near_what_autograd_keeps(override: str) -> None:
    """Measured: storages that the graph holds, parameters left out. An estimate: within 10 %."""
    config = planned(*SMALL, *override.split())
    model, rows = materialized(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**rows)
    measured = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    # The loss keeps its states' gradients outside autograd.
    measured += 4 * (1 + config.mtp.depth) * config.train.micro_batch * config.train.sequence_length * config.model.hidden
    assert budget.chunk_activations(config, config.model.layers, last=True) == pytest.approx(measured, rel=0.1)


def test_fit_names_a_layout_that_fits_and_none_smaller_does() -> None:
    config = planned("model=1b", "model.layers=16", "train.global_batch=64", "world_memory_gib=6")
    assert largest_rank(config) > 6 * GIB
    found = smallest_layout(config)
    assert found is not None
    assert largest_rank(found) <= 6 * GIB
    world = found.parallel.pipeline * found.parallel.tensor * found.parallel.data
    assert world > 1
    roomy = replace(config, world_memory_gib=largest_rank(config) / GIB)
    same = smallest_layout(roomy)
    assert same is not None
    assert same.parallel == config.parallel
    assert smallest_layout(replace(config, world_memory_gib=1e-3)) is None
    assert f"parallel.tensor={found.parallel.tensor}" in text(config, None)
    for asked, verdict in ((config, "does not fit"), (roomy, "fits")):
        assert [line for line in text(asked, None).splitlines() if line.startswith(f"{verdict}: the fullest rank needs about")]


def test_text_says_where_everything_is() -> None:
    page = text(planned("parallel=v2_tensor2", "train.global_batch=32"), None)
    assert "0 .. 1" in page and "2 .. 3" in page
    assert "final norm, 2 MTP modules, the same embedding, output head (the embedding)" in page
    classic = text(planned("parallel=classic2"), None)
    assert "final norm, 2 MTP modules, replica of the embedding, output head (the embedding)" in classic
    assert "32 rows of 256 positions = 8,192 tokens a step; 8 micro-batches of 4 rows for the one replica" in classic
    assert "10 steps, 81,920 tokens" in classic


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tensor=3", "train.global_batch=30", "model.heads=6", "mtp.kind=none", "zero.stage=3", "data.lanes=7",
        "train.steps=null",
    ],
)
def test_problems_are_those_of_training(override: str) -> None:
    with pytest.raises(UserError) as planning:
        planned(override)
    run = compose("train", TrainingRun, ["run_dir=x", "data.path=x", "train.steps=10", "model.vocab_size=1024", override])
    with pytest.raises(UserError) as training:
        validate(run, None)
    assert str(planning.value) == str(training.value)


def test_a_vocabulary_or_a_dataset_is_needed() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size is null and data\.path is empty"):
        planned("model.vocab_size=null")
    with pytest.raises(UserError, match="nowhere is not a dataset"):
        planned("model.vocab_size=null", "data.path=nowhere")
    config, dataset = prepare(compose("plan", Plan, ["train.steps=10", "model.vocab_size=64", "data.path=nowhere"]))
    assert dataset is None
    assert "data.path=nowhere does not exist" in text(config, dataset)


def test_a_model_alone_is_planned_as_such_a_model_is_trained() -> None:
    config, assumed = with_assumptions(["model=llama3_8b"])
    full, dataset = prepare(config)
    assert dataset is None
    assert full.train.sequence_length == 4096
    assert full.train.global_batch * full.train.sequence_length == 2**22
    assert full.train.tokens == 170 * 10**9, "20 tokens a parameter"
    assert largest_rank(full) <= full.world_memory_gib * GIB
    assert "parallel.tensor=2" in assumed
    page = text(full, dataset)
    assert [line for line in page.splitlines() if line.startswith("fits: the fullest rank needs about")]


def test_what_was_given_is_not_assumed() -> None:
    given = ["model=llama3_8b", "train.steps=10", "parallel=tensor2", "train.sequence_length=1Ki", "train.global_batch=64"]
    config, assumed = with_assumptions(given)
    assert (config.train.steps, config.train.tokens, config.train.sequence_length) == (10, None, 1024)
    assert (config.parallel.tensor, config.parallel.data, config.train.global_batch) == (2, 1, 64)
    assert sorted(word.partition("=")[0] for word in assumed) == ["data.lanes", "train.micro_batch"]
    small, assumed = with_assumptions(["model=tiny", "model.vocab_size=512", "train.steps=3"])
    assert assumed == []
    assert small == compose("plan", Plan, ["model=tiny", "model.vocab_size=512", "train.steps=3"])
    assert with_assumptions(["experiment=quickstart", "model.vocab_size=4096"])[1] == []


def test_wrong_settings_are_said_and_not_hidden_by_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    config, assumed = with_assumptions(["model=llama3_8b", "parallel.tensor=3", "train.steps=10"])
    assert assumed == []
    with pytest.raises(UserError, match=r"parallel\.tensor=3 does not divide"):
        prepare(config)
    config, assumed = with_assumptions(["model=tiny"])
    assert assumed == ["model.vocab_size=32000", "train.tokens=1.1e8"]
    assert run(config, assumed) == 0
    assert capsys.readouterr().out.startswith(f"assumed, as not given: {' '.join(assumed)}\n\nlayout: ")


def test_command_needs_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['plan', 'model=tiny', 'model.vocab_size=512', 'train.steps=3']; "
        "import runpy, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
        "runpy.run_module('mtp_dist.plan', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
    assert "smallest layout that fits: parallel.pipeline=1 parallel.tensor=1 parallel.data=1" in done.stdout


def test_schedules_are_compared() -> None:
    """The chosen schedule keeps its placement; the others are balanced, and those that this run cannot use are left out."""
    config = planned("parallel=v2", "train.global_batch=8", "train.micro_batch=4", "parallel.placement=[1,1,1,1]")
    shown = text(config, None)
    assert "zbv (chosen)" in shown
    assert "[1,1,1,1]" in shown
    assert "\n1f1b " in shown
    assert "dualpipev" not in shown, "it needs four micro-batches"


def test_measured_times_replace_operations(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("plan", Plan, [
        "parallel=v2", "train.steps=1", "model.vocab_size=64", "model.hidden=32", "model.mlp=48", "train.sequence_length=16",
        "measure=true", "launch.device=cpu",
    ])  # fmt: skip
    assert run(config) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("parallel.costs="))
    costs = [float(part) for part in line.split('"')[1].strip("[]").split(",")]
    assert len(costs) == 6
    assert min(costs) > 0
    assert "(times of parallel.costs)" in shown
    again = compose("plan", Plan, ["parallel=v2", "train.steps=1", "model.vocab_size=64", line.replace('"', "")])
    assert prepare(again)[0].parallel.costs == costs


def test_a_model_that_no_layout_holds_gets_the_settings_that_save_memory(capsys: pytest.CaptureFixture[str]) -> None:
    config, assumed = with_assumptions(["model=llama3_405b"])
    assert run(config, assumed) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "with parallel.sequence_parallel=true this one does: parallel.pipeline=16 parallel.tensor=8" in told
    typed = ["parallel.sequence_parallel=true", "parallel.pipeline=16", "parallel.tensor=8", "parallel.data=8"]
    full = prepare(with_assumptions(["model=llama3_405b", *typed])[0])[0]
    assert largest_rank(full) <= full.world_memory_gib * 2**30
