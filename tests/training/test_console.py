"""Promise: whatever was measured at a step, showing it never ends a run."""

import pytest

from mtp_dist.tracking import names
from mtp_dist.training.console import Console


def test_a_step_with_validation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(10, 0, on=True)
    console.step(5, {names.VALIDATION_LOSS_MAIN: 1.0})
    console.step(6, {})
    console.step(10, {names.LOSS_TOTAL: 2.0, names.LOSS_MAIN: 1.5, names.LEARNING_RATE: 1e-3, names.GRADIENT_NORM: 0.5})
    assert "step 10/10  loss 2.0000  main 1.5000" in capsys.readouterr().out
