"""Promise: every command answers help and bad input alike, at once, and without loading torch."""

import errno
import os
import subprocess
import sys

import pytest

from mtp_dist.config.command import application, guarded
from mtp_dist.config.compose import settings
from mtp_dist.config.documentation import ROOTS
from mtp_dist.config.folder import groups
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError


def status_of(argv: list[str], run=lambda config: None, **more: object) -> int:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as caught:
        application("train", TrainingRun, run, argv=argv, **more)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_help_shows_usage_examples_groups_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--help", "model.dmi=3"], examples=["do this"], epilog="the end") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m mtp_dist.train ")
    for key in settings(TrainingRun):
        assert f"\n  {key}=" in text
    for option in groups()["parallel"]:
        assert option in text
    for word in ["do this", "the end", "--cfg", f"experiment={'|'.join(groups()['experiment'])} "]:
        assert word in text


@pytest.mark.parametrize("root", ROOTS)
def test_every_command_has_help(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        application(root, ROOTS[root], lambda config: 1, argv=["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python ")


def test_help_and_composing_and_freezing_do_not_import_torch() -> None:
    code = """
import sys
import mtp_dist.freezing, mtp_dist.launching
from mtp_dist.config.command import help_text
from mtp_dist.config.documentation import ROOTS
for root, schema in ROOTS.items():
    assert help_text(root, schema)
heavy = [name for name in ("torch", "deepspeed", "wandb", "matplotlib", "numpy") if name in sys.modules]
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cfg_prints_the_composed_settings_and_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: TrainingRun) -> None:
        raise AssertionError("must not run")

    assert status_of(["--cfg", "model=small", "optim.lr=0.5"], run) == 0
    text = capsys.readouterr().out
    assert "  layers: 8\n" in text
    assert "  lr: 0.5\n" in text


def test_the_commands_answer_is_the_exit_status() -> None:
    seen: list[TrainingRun] = []
    assert status_of(["train.steps=3"], lambda config: seen.append(config)) == 0
    assert seen[0].train.steps == 3
    assert status_of([], lambda config: 7) == 7


@pytest.mark.parametrize("argv", [["model.dmi=3"], ["--verbose"], ["train.steps=x"], ["word"], ["-x"]])
def test_bad_input_is_one_line_on_the_standard_error_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_users_error_inside_the_command_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: TrainingRun) -> None:
        raise UserError("a\nb")

    assert status_of([], run) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_an_interrupt_is_130_and_other_errors_keep_their_traceback() -> None:
    def interrupted(config: TrainingRun) -> None:
        raise KeyboardInterrupt

    def broken(config: TrainingRun) -> None:
        raise ValueError("a bug")

    assert status_of([], interrupted) == 130
    with pytest.raises(ValueError, match="a bug"):
        application("train", TrainingRun, broken, argv=[])


def test_a_shortcut_stands_in_for_composing() -> None:
    ready = TrainingRun(seed=5)
    seen: list[TrainingRun] = []
    assert status_of(["run_dir=x"], seen.append, shortcut=lambda argv: ready if argv == ["run_dir=x"] else None) == 0
    assert status_of(["run_dir=y"], seen.append, shortcut=lambda argv: ready if argv == ["run_dir=x"] else None) == 0
    assert seen[0] is ready
    assert seen[1].run_dir == "y"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from mtp_dist.config.command import application\nfrom mtp_dist.config.schema import TrainingRun\n"
    code += "application('train', TrainingRun, lambda config: 0, argv=['--help'])"
    shell = f'set -o pipefail; "{sys.executable}" -c "{code}" | head -c 1 > /dev/null'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_said_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(number, os.strerror(number), "runs/a/file")

    assert guarded(write) == 2
    assert capsys.readouterr().err == f"error: runs/a/file: {os.strerror(number)}\n"
    with pytest.raises(FileNotFoundError):  # may be a mistake of ours, which needs its traceback
        guarded(lambda: print(os.stat("does/not/exist")))
