"""Promise: docs/checkpoint-format.md is enough to read a checkpoint without this project."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtp_dist.checkpoint.manifest import FORMAT, UNSUMMED, WITH_DRAFT_TOKENS, WITH_OWN_MATRICES, Manifest
from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.parallel.engine import PARTS
from tests.distributed.pool import ROOT
from tests.interop.conftest import KINDS

PAGE = (ROOT / "docs" / "checkpoint-format.md").read_text()
# Appended to the document's program: every parameter and part of a checkpoint into one file.
DUMP = """
import sys
names = json.loads(Path(sys.argv[1], "MANIFEST.json").read_text())["parameters"]
np.savez(sys.argv[2], **{f"{name}|{part}": read(sys.argv[1], name, part) for name in names for part in sys.argv[3:]})
assert "torch" not in sys.modules and "mtp_dist" not in sys.modules
"""


def program() -> str:
    [found] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_of_the_page_reads_everything(checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    (tmp_path / "read.py").write_text(program() + DUMP)
    command = [sys.executable, "-I", str(tmp_path / "read.py"), str(checkpoints[kind]), str(tmp_path / "all.npz"), *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "all.npz")
    checkpoint = Checkpoint(checkpoints[kind])
    assert set(found) == {f"{name}|{part}" for name in checkpoint.manifest.parameters for part in PARTS}
    for label, values in found.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, checkpoint.read(*label.split("|")).numpy()), label


def test_checkpoints_have_several_boxes_and_several_shards(checkpoints: dict[str, Path]) -> None:
    """Else the program above would have had nothing to put together."""
    pieces = {
        kind: [(tuple(f.start), f.begin) for record in Checkpoint(path).manifest.parameters.values() for f in record.fragments]
        for kind, path in checkpoints.items()
    }
    assert any(any(start) for start, _ in pieces["untied"])
    assert any(begin for _, begin in pieces["pre_norm"])


def test_the_page_names_every_key_file_and_parameter(checkpoints: dict[str, Path]) -> None:
    keys = {line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")}
    assert set(Manifest.__dataclass_fields__) <= keys
    assert all(f"`{known}`" in PAGE for known in (FORMAT, UNSUMMED, WITH_DRAFT_TOKENS, WITH_OWN_MATRICES))
    for path in checkpoints.values():
        manifests, ranks = {"MANIFEST.json", "MANIFEST.sha256"}, {"rank_00000.safetensors", "rank_00001.safetensors"}
        assert {file.name for file in path.iterdir()} == manifests | ranks | {"config.yaml", "tokenizer.json"}
        manifest = json.loads((path / "MANIFEST.json").read_text())
        assert set(manifest["files"]) == {file.name for file in path.iterdir()} - manifests
    for name in Checkpoint(checkpoints["untied"]).manifest.parameters:
        owner = name.split(".")[0]
        assert f"`{owner}." in PAGE
        assert f"`{name.split('.')[-2]}." in PAGE or f".{name.split('.')[-2]}." in PAGE, name
