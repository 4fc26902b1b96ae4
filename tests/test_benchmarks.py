"""Promise: a benchmark compares the same computation on both sides. Nothing is timed here."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.decode import Contestant, compete
from benchmarks.head_memory import inputs, own_loss, whole_loss
from benchmarks.held_out_prompts import RUN, held_out_prompts
from benchmarks.notebook_loop import Setup
from benchmarks.timing import median_interval, take_turns, total_ratio
from mtp_dist.config.schema import ShardBuild
from mtp_dist.data.building import build
from mtp_dist.data.reading import SampleReader
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("depth", [0, 2])
def test_head_memory_compares_equal_losses_and_gradients(depth: int) -> None:
    found = []
    for compute in (own_loss, whole_loss):
        states, weight, wanted = inputs(depth, rows=2, sequence=24, hidden=8, vocabulary=50)
        loss = compute(states, weight, wanted)
        loss.backward()
        found.append([loss.detach(), weight.grad, *(state.grad for state in states)])
    for own, whole in zip(*found, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-6)


def test_notebook_loop_computes_the_same() -> None:
    setup = Setup(hidden=16, depth=3, vocabulary=40, tokens=20, rows=2)
    assert setup.loop().shape == (2, 17, 3, 40)
    assert setup.difference() < 1e-4
    # The check can fail: another weight in one of the two.
    right = setup.vectorised()
    with torch.no_grad():
        setup.heads.projections[2].weight[0, 0] += 0.1
    assert (setup.loop() - right).abs().max() > 1e-3


def test_all_pipelines_compute_the_same_losses() -> None:
    """DeepSpeed's 1F1B at two partitions, its DualPipeV, and this project's two placements, for three optimizer steps."""
    sizes = {"layers": 4, "hidden": 32, "vocabulary": 128, "depth": 2, "sequence": 16, "micro-batches": 8}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.pipeline_step", "--check", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("losses of the first steps:")[1].splitlines()
    losses = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines if line.startswith("  ")}
    assert set(losses) == {"balanced", "uniform", "default", "best", "dualpipev"}
    for values in losses.values():
        assert values == pytest.approx(losses["balanced"], abs=1e-4)
        assert values[0] > values[2] + 1e-3  # the weights move


def test_interval_holds_the_median_and_turns_alternate() -> None:
    middle, low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low <= middle == 3.0 <= high
    assert median_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    called: list[str] = []
    times = take_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=2, warm_up=0)
    assert called == ["a", "b", "b", "a"]
    assert [len(values) for values in times.values()] == [2, 2]


def test_held_out_prompts_share_no_run_with_training(tmp_path: Path) -> None:
    """Half of the texts hold a passage of 32 letters that others hold, too; the prompt itself may lie elsewhere."""
    source = random.Random(0)

    def letters(count: int) -> str:
        return "".join(source.choices("abcdefghijklmnop", k=count))

    passage = letters(RUN)
    texts = [letters(60) + (passage if number % 2 else letters(RUN - 1)) + letters(40) for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = ShardBuild(source="jsonl", input=[str(tmp_path / "texts.jsonl")], out=str(tmp_path / "data"), validation_share=0.3)
    config.tokenizer.kind = "bytes"
    data = build(config)[0]
    split = data.split("validation")
    held_out = [bytes(sample.tokens[:-1].tolist()).decode() for sample in SampleReader(split).read(0, split.documents)]
    unknown = [text for text in held_out if passage not in text]
    assert 0 < len(unknown) < len(held_out)
    prompts = [bytes(prompt).decode() for prompt in held_out_prompts(data, len(unknown), 50)]
    assert sorted(text for text in unknown for prompt in prompts if prompt in text) == sorted(unknown)
    with pytest.raises(UserError, match="validation_share"):
        held_out_prompts(data, len(unknown) + 1, 50)


def test_decoding_contestants_meet_every_prompt_in_turn() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str) -> Contestant:
        def write(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
            calls.append((name, prompts[0][0]))
            return [[7] * 3 for _ in prompts], None

        return Contestant(write)

    both = {"a": contestant("a"), "b": contestant("b")}
    compete(both, [[[1], [2]], [[3]]], 2, 2, lambda _: None)
    assert calls == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("b", 3), ("a", 3), ("b", 1), ("a", 1), ("a", 3), ("b", 3)]
    assert [(len(each.seconds), each.tokens, len(each.texts)) for each in both.values()] == [(4, 18, 3)] * 2


def test_groups_of_a_turn_share_its_time() -> None:
    """By their texts' own seconds, those of the prompts' pass included."""
    given: list[int] = []

    def write(prompts: list[list[int]]) -> tuple[list[list[int]], list[Statistics]]:
        given.append(len(prompts))
        return [[7] for _ in prompts], [Statistics(prefill_seconds=1.0, seconds=float(prompt[0])) for prompt in prompts]

    one = Contestant(write, whole=True)
    compete({"one": one}, [[[1], [2], [3], [4], [5]]], 2, 1, lambda _: None)
    assert given == [2, 5]
    assert [second / one.seconds[0] for second in one.seconds] == pytest.approx([1, 9 / 5, 6 / 5])
    assert one.loops == [3, 7, 5]


def test_total_ratio() -> None:
    assert total_ratio([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)
    middle, low, high = total_ratio([1.0, 5.0], [1.0, 1.0])
    assert (middle, low, high) == (3.0, 1.0, 5.0)
