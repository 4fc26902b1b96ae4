"""Promise: a text that a run continues at its validations is the one that its checkpoint gives, in any layout; and the run trains
as it does without it."""

from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig
from mtp_dist.config.validation import validate_training
from mtp_dist.data.detokenizer import decoded
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.engine import generate
from mtp_dist.errors import UserError
from mtp_dist.tracking.jsonl import read_records
from tests.distributed.layouts import configuration
from tests.distributed.pool import run_jobs

PROMPT, STEPS = "ab 1", 2
LAYOUTS = ("pp2_zbv", "pp2_1f1b", "tp2", "dp2_zero1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A run folder for each layout, and one without a text."""
    folder = tmp_path_factory.mktemp("sample")
    jobs = []
    for name in (*LAYOUTS, "silent"):
        overrides: dict[str, Any] = {"train.dtype": "float32", "optim.lr": 0.05, "validation.every_steps": 1}
        if name != "silent":
            overrides |= {"validation.prompt": PROMPT, "validation.prompt_tokens": 12}
        arguments = {"layout": "pp2_zbv" if name == "silent" else name, "data": str(tiny_dataset), "run_dir": str(folder / name)}
        arguments |= {"steps": STEPS, "stops": [], "overrides": overrides}
        jobs.append({"name": name, "task": "train", "arguments": arguments})
    run_jobs(2, jobs, folder / "pool")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_is_the_checkpoints(runs: Path, layout: str) -> None:
    model = Checkpoint(runs / layout / "checkpoints" / f"step_{STEPS:08d}").load_model()
    config = DecodeConfig(max_new_tokens=12)
    found = generate(model, list(PROMPT.encode()), config, end=256, vocabulary=257)
    text = PROMPT + decoded(byte_tokenizer(), found.tokens)
    files = sorted((runs / layout / "samples").iterdir())
    assert [file.name for file in files] == ["step_00000001.txt", "step_00000002.txt"]
    assert files[-1].read_text() == text + "\n"
    rates = [record["validation/tokens_per_forward"] for record in read_records(runs / layout / "metrics.jsonl")]
    assert len(rates) == STEPS
    assert rates[-1] == found.statistics.tokens_per_forward


def test_training_is_the_same_without_it(runs: Path) -> None:
    spoken, silent = (Checkpoint(runs / name / "checkpoints" / f"step_{STEPS:08d}") for name in ("pp2_zbv", "silent"))
    assert not (runs / "silent" / "samples").exists()
    for name in spoken.manifest.parameters:
        assert spoken.read(name, "master").equal(silent.read(name, "master")), name
        assert spoken.read(name, "exp_avg_sq").equal(silent.read(name, "exp_avg_sq")), name


@pytest.mark.parametrize(
    ("layout", "train", "message"),
    [
        ("tp2_sequence_selective", {}, "parallel.sequence_parallel=true shares positions"),
        ("dp2_zero3_frozen", {}, "zero.stage=3 gathers weights for training alone"),
        ("pp2_zbv", {"compile": True}, "train.compile=true compiles blocks for training alone"),
    ],
)
def test_what_cannot_be_continued_is_told(layout: str, train: dict[str, Any], message: str) -> None:
    config = configuration(layout, **train)
    config.validation.prompt = PROMPT
    with pytest.raises(UserError, match="validation.prompt cannot be continued: " + message):
        validate_training(config, None)
