"""Promise: one command says what a checkpoint holds, whether it is sound, and in what two differ."""

import shutil
from pathlib import Path

import pytest

from mtp_dist.config.command import application
from mtp_dist.config.schema import Inspection
from mtp_dist.inspect import run


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        application("inspect", Inspection, run, argv=words, paths=("checkpoint", "other"))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err  # type: ignore[arg-type]


def test_what_is_in_it(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, str(checkpoints["untied"].parents[1]), "parameters=true")
    assert status == 0
    assert "newest of 1" not in text
    for part in ("step         6 (", "concat hidden_first", "tensor 2, schedule zbv, ZeRO 1, 2 processes", "sound: every file"):
        assert part in text
    assert "head.weight" in text and "[265, 32] in 2 fragments" in text


def test_a_path_with_an_equals_sign(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints["tied"], tmp_path / "sweeps" / "lr=0.1")
    monkeypatch.chdir(tmp_path / "sweeps")
    for path in ("lr=0.1", "./lr=0.1", str(tmp_path / "sweeps" / "lr=0.1"), "../sweeps/lr=0.1"):
        status, text = said(capsys, path, "verify=false")
        assert status == 0, text
        assert f"checkpoint   {Path(path)}" in text
        status, text = said(capsys, f"checkpoint={path}", f"other={path}", "verify=false")
        assert status == 0 and "the same bits" in text
    status, text = said(capsys, "lr=0.2")
    assert status == 2 and "lr is not a setting of Inspection" in text
    status, text = said(capsys, "no/such=place")
    assert status == 2 and "no/such=place" in text


def test_a_damaged_one(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoints["tied"], tmp_path / "copy")
    path = tmp_path / "copy" / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, text = said(capsys, str(tmp_path / "copy"))
    assert status == 1
    assert "damaged: rank_00001.safetensors" in text
    assert said(capsys, str(tmp_path / "copy"), "verify=false")[0] == 0
    status, text = said(capsys, str(checkpoints["tied"]), str(tmp_path / "copy"))
    assert (status, text.splitlines()[-1].split(" is damaged")[0]) == (2, f"error: other={tmp_path / 'copy'}")


def test_how_two_differ(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, str(checkpoints["tied"]), str(checkpoints["untied"]))
    assert status == 0
    for part in ("model.tie_embeddings", "contract.concat", "only in the second", "values that differ: ", "(parameters=true"):
        assert part in text
    text = said(capsys, str(checkpoints["tied"]), str(checkpoints["tied"]))[1]
    assert "settings: the same" in text and "manifest: the same" in text and "shapes: the same" in text
    assert "the same bits in all" in text


def test_a_third_path_is_refused_like_any_wrong_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "/nowhere")[0] == 2
    assert said(capsys, "one", "two", "three=3")[0] == 2
