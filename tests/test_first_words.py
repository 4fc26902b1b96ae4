"""Promise: a command that cannot begin says so before it loads torch, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "generate": ["prompt=x"],
    "generate in a layout": ["prompt=x", "parallel.tensor=2"],
    "generate with a small model": ["prompt=x", "decode.drafter=model", "decode.draft_model=nowhere"],
    "generate interactively": ["interactive=true"],
    "serve": ["port=0"],
    "evaluate": [],
    "evaluate in a layout": ["parallel=v2"],
    "evaluate a decoder": ["task=decode", "file=prompts.jsonl"],
    "export": ["out=exported"],
    "inspect": [],
}
# An import of torch would fail.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_checkpoint_that_does_not_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('"x"\n')
    command = [sys.executable, "-c", WITHOUT_TORCH, f"mtp_dist.{name.split()[0]}", "checkpoint=typo", *COMMANDS[name]]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: checkpoint=typo does not exist; give a run folder or a checkpoint folder\n"
    assert done.stdout == ""
