"""Promise: a save in the background is the save that would have been made at its step, and one is in flight at most."""

from pathlib import Path

from safetensors.torch import load_file

from mtp_dist.checkpoint.reader import Checkpoint
from tests.distributed.pool import run_jobs


def test_training_goes_on_and_the_save_is_of_its_step(tmp_path: Path, tiny_dataset: Path) -> None:
    jobs = []
    for name, asynchronous in (("background", True), ("waiting", False)):
        arguments = {"data": str(tiny_dataset), "run_dir": str(tmp_path / name), "asynchronous": asynchronous}
        jobs.append({"name": name, "task": "background_save", "arguments": arguments})
    results = run_jobs(2, jobs, tmp_path)
    for rank in range(2):
        assert results["background"][rank]["trained"][:3] == [1, 2, 3]
        assert results["waiting"][rank]["trained"] == [1]
    assert not any(result["met"] for ranks in results.values() for result in ranks)
    for step in (2, 4, 5):
        folders = {name: tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in results}
        assert Checkpoint(folders["background"]).damages() == []
        for path in sorted(folders["waiting"].glob("rank_*")):
            expected, found = load_file(path), load_file(folders["background"] / path.name)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert value.equal(found[key]), (step, path.name, key)
