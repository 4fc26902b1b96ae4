"""Promise: whatever was measured at a step, showing it never ends a run."""

import pytest

from mtp_dist.tracking import names
from mtp_dist.training.console import Console


def test_a_step_with_validation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(10, 0, on=True)
    console.step(5, {names.VALIDATION_LOSS_MAIN: 1.0})
    console.step(6, {})
    console.step(10, {names.LOSS_TOTAL: 2.0, names.LOSS_MAIN: 1.5, names.LEARNING_RATE: 1e-3, names.GRADIENT_NORM: 0.5})
    assert "step 10/10  100%  ETA 0:00  loss 2.0000  main 1.5000" in capsys.readouterr().out


def test_validation_is_a_small_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        names.VALIDATION_LOSS_TOTAL: 2.5,
        names.VALIDATION_LOSS_MAIN: 2.0,
        names.VALIDATION_ACCURACY_MAIN: 0.5,
        names.of_depth(names.VALIDATION_LOSS_DEPTH, 1): 3.0,
        names.of_depth(names.VALIDATION_ACCURACY_DEPTH, 1): 0.25,
        names.of_depth(names.VALIDATION_ACCURACY_CONDITIONAL_DEPTH, 1): 0.375,
    }
    Console(10, 0, on=True).validation(4, metrics)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "validation at step 4: held-out loss 2.5000 in all"
    assert [line.split() for line in lines[2:]] == [["main", "2.0000", "50.0%"], ["depth", "1", "3.0000", "25.0%", "37.5%"]]
