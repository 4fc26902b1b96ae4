"""Promise: a library of another version than the pinned one is named at start, with the command that mends it."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

from data import build_shards
from mtp_dist import evaluate, export, freezing, generate, serve
from mtp_dist.config import schema, versions
from mtp_dist.errors import UserError

PINS = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_pins_come_from_the_packages_own_requirements() -> None:
    pins = versions.exact_pins(importlib.metadata.requires("mtp_dist") or [])
    assert set(pins) == {"torch", "deepspeed", "webdataset", "hydra-core"}
    assert versions.exact_pins(["a == 1.0", "b>=2", 'c==3; extra == "dev"', "d<4,>=3"]) == {"a": "1.0"}


def test_what_is_pinned_passes_whatever_it_was_built_for() -> None:
    assert versions.findings(PINS, {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}) == ([], [])


@pytest.mark.parametrize("found", ["2.11.0", "2.12.1+cu130", "2.14.0", "3.0"])
def test_a_near_torch_is_a_warning(found: str) -> None:
    warnings, errors = versions.findings(PINS, {**PINS, "torch": found})
    assert errors == []
    assert found in warnings[0]
    assert "pip install torch==2.13.0" in warnings[0]


@pytest.mark.parametrize(
    ("name", "found"), [("torch", "2.10.0"), ("torch", None), ("deepspeed", "0.19.9"), ("deepspeed", "0.19"), ("deepspeed", None)]
)
def test_anything_else_is_an_error(name: str, found: str | None) -> None:
    warnings, errors = versions.findings(PINS, {**PINS, name: found})
    assert warnings == []
    assert (found or "not installed") in errors[0]
    assert f"pip install {name}=={PINS[name]}" in errors[0]


def test_a_package_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    with pytest.raises(UserError, match=r"mtp_dist is not installed.* launch/install\.sh"):
        versions.check()


def test_every_command_that_needs_the_libraries_checks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise UserError("refused")

    monkeypatch.setattr(versions, "check", refused)
    commands: list[tuple[Callable[[Any], Any], Any]] = [
        (evaluate.prepare, schema.Evaluation()),
        (export.run, schema.Export(out="x")),
        (freezing.check, schema.TrainingRun()),
        (generate.run, schema.Generation()),
        (serve.run, schema.Serving()),
        (build_shards.run, schema.ShardBuild()),
    ]
    for command, config in commands:
        with pytest.raises(UserError, match=r"^refused$"):
            command(config)


def test_an_error_may_be_turned_into_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "webdataset" else real(name))
    with pytest.raises(UserError, match=r"webdataset 0\.0\.1 is installed, mtp_dist needs"):
        versions.check()
    monkeypatch.setenv(versions.ALLOW, "1")
    versions.check()
    assert "warning: webdataset 0.0.1" in capsys.readouterr().err
