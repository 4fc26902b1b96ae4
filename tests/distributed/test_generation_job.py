"""Promise: the command under a layout gives what it gives in one process, printed once; what does not fit is told in one line
before any process starts or any weight is read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.config.schema import DecodeConfig, Generation, LaunchConfig, MTPConfig, ParallelConfig
from mtp_dist.errors import UserError
from mtp_dist.generate import run
from mtp_dist.generation_job import prepare
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import SENTENCE, save
from tests.distributed.pool import ROOT, run_jobs

PROMPTS = ["fox jump", "gray fox jum", "a fox", "gray", "jumped"]
V = {"pipeline": 2, "schedule": "zbv"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of a model that knows one sentence, and prompts beside it."""
    folder = tmp_path_factory.mktemp("run")
    chunk = taught(random_model(2, std=0.02, layers=4, vocabulary=257 + 8), list(SENTENCE.encode()), steps=80)
    save(folder / "checkpoints" / "step_00000060", chunk, MTPConfig(depth=2))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return folder


def asked(trained: Path, **decode: Any) -> dict[str, Any]:
    settings = {"mode": "both", "batch": 2, "max_new_tokens": 20, **decode}
    return {"checkpoint": str(trained), "prompt_file": str(trained / "prompts.jsonl"), "seed": 3, "decode": settings}


def alone(request: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, list[list[int]]]]:
    """What one process prints, and its tokens."""
    config = Generation(**request, output=str(place / "alone.json"))
    config.decode, config.launch = DecodeConfig(**request["decode"]), LaunchConfig(device="cpu")
    assert run(config) == 0
    items = json.loads((place / "alone.json").read_text())["prompts"]
    return capsys.readouterr().out, {mode: [item[mode]["tokens"] for item in items] for mode in ("plain", "speculative")}


def texts(printed: str) -> str:
    """Without the numbers, which hold times."""
    return re.split(r"^--- step", printed, flags=re.MULTILINE)[0]


def test_a_layout_continues_the_prompts_as_one_process_does(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipeline, and dealt to two replicas; greedy, and drawn with a seed."""
    cases = {"greedy": asked(trained), "drawn": asked(trained, temperature=0.7, draft=3)}
    layouts = {"v": V, "replicas": {"data": 2}}
    jobs = [
        {"name": f"{layout}-{case}", "task": "continued", "arguments": {"settings": request | {"parallel": layouts[layout]}}}
        for layout in layouts
        for case, request in cases.items()
    ]
    found = run_jobs(2, jobs, tmp_path / "pool")
    for case, request in cases.items():
        printed, expected = alone(request, tmp_path, capsys)
        for layout in layouts:
            first, second = found[f"{layout}-{case}"]
            assert first["texts"] == second["texts"] == expected
            assert texts(first["printed"]) == texts(printed)
            assert second["printed"] == ""


def test_what_one_rank_finds_wrong_all_are_told(trained: Path, tmp_path: Path) -> None:
    settings = asked(trained) | {"checkpoint": str(tmp_path), "parallel": V}
    [first, second] = run_jobs(2, [{"name": "none", "task": "continued", "arguments": {"settings": settings}}], tmp_path)["none"]
    assert first == second
    assert first["error"].startswith(f"AgreedError: checkpoint={tmp_path} holds no complete checkpoint")


@pytest.mark.parametrize(
    ("parallel", "others", "message"),
    [
        ({"tensor": 3}, {}, "parallel.tensor=3 does not divide model.heads=4; choose 1, 2 or 4"),
        ({"pipeline": 6, "schedule": "1f1b"}, {}, "model.layers=4 is too few for 6 chunks"),
        ({"tensor": 2, "sequence_parallel": True}, {}, "choose parallel.sequence_parallel=false"),
        ({"data": 2}, {"stream": True, "decode": {"batch": 1, "mode": "plain"}}, "choose parallel.data=1, not 2"),
        (V, {"decode": {"int8": True}}, "decode.int8=true is for a model in one process"),
        (V, {"decode": {"compile": True}}, "decode.compile=true is for a model in one process"),
        (V, {"decode": {"drafter": "model", "draft_model": "nowhere"}}, "decode.draft_model=nowhere does not exist"),
        (V, {"launch": {"nodes": 3}}, "launch.nodes=3 does not divide"),
    ],
)
def test_what_does_not_fit_is_told_before_any_start(
    parallel: dict[str, Any], others: dict[str, Any], message: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", None)  # weights cannot be loaded without it
    config = Generation(checkpoint=str(trained), prompt="a", stream=others.get("stream", False))
    config.parallel, config.launch = ParallelConfig(**parallel), LaunchConfig(**others.get("launch", {}))
    config.decode = DecodeConfig(**others.get("decode", {}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_command_line(trained: Path, tmp_path: Path) -> None:
    """Started by hand, which starts torchrun; under torchrun with settings of its own; and there with one that does not fit."""
    words = [f"checkpoint={trained}", f"prompt_file={trained}/prompts.jsonl", "decode.mode=both", "decode.max_new_tokens=20"]
    words += ["launch.device=cpu", "decode.batch=2"]
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m"]
    starts = {
        "alone": ["mtp_dist.generate"],
        "layout": ["mtp_dist.generate", "parallel=v2"],
        "torchrun": [*torchrun, "mtp_dist.generate", "parallel.tensor=2"],
        "wrong": [*torchrun, "mtp_dist.generate", "parallel.tensor=2", "decode.draft=0"],
    }
    done = {
        name: subprocess.run(
            [sys.executable, "-m", *start, *words, f"output={tmp_path / name}.json"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )
        for name, start in starts.items()
    }
    for name in ("alone", "layout", "torchrun"):
        assert done[name].returncode == 0, done[name].stderr
        assert texts(done[name].stdout) == texts(done["alone"].stdout)
        found, expected = (json.loads((tmp_path / f"{each}.json").read_text())["prompts"] for each in (name, "alone"))
        for mode in ("plain", "speculative"):
            assert [item[mode]["tokens"] for item in found] == [item[mode]["tokens"] for item in expected]
    assert done["wrong"].returncode != 0
    assert done["wrong"].stderr.count("error: decode.draft=0 must be a whole number from 1") == 1
