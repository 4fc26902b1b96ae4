"""Promise: one rule for every number, wherever it comes from; each has bounds that make sense, and an error names setting, value
and bounds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import compose as composing
from mtp_dist.config.bounds import BOUNDS, bounds_of
from mtp_dist.config.compose import changed, compose, load, save, settings, value
from mtp_dist.config.documentation import ROOTS
from mtp_dist.config.numbers import Bounds, NotANumberError, fault, numbers_in, parsed, parts, takes_number
from mtp_dist.config.schema import Evaluation, Generation, ShardBuild, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.serving.request import RequestError, Served, read

NUMBERS = [(root, key, kind) for root, schema in ROOTS.items() for key, kind in settings(schema).items()
           if bounds_of(key, kind) is not None]  # fmt: skip


def refusal(root: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(root, ROOTS[root], list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_every_number_setting_has_bounds_and_its_default_is_within() -> None:
    assert {key for _, key, _ in NUMBERS} == set(BOUNDS), "an entry of BOUNDS for each number setting, and none for others"
    for root, key, _ in NUMBERS:
        default = value(ROOTS[root](), key)
        for number in numbers_in(default):
            assert number is None or fault(number, BOUNDS[key], whole=isinstance(number, int)) is None, key


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", ".nan", "1e400", "9" * 400, "-" + "9" * 5000, "1e300", "1T"])
def test_no_number_setting_takes_what_no_machine_has(text: str) -> None:
    for root, key, kind in NUMBERS:
        typed = text if "list" not in str(kind) else f"[[{text}]]" if "list[list" in str(kind) else f"[{text}]"
        if text == "1T" and BOUNDS[key].hold(10**12):
            continue
        with pytest.raises(UserError) as caught:
            composing._value(key, typed, kind, ROOTS[root])
        assert str(caught.value).startswith(f"{key}=")
        assert str(BOUNDS[key]).removeprefix("0, or ") in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.lanes=10**9", ["data.lanes=10**9", "takes int, such as data.lanes=8"]),
        ("data.lanes=1B", ["data.lanes=1B", "from 1 to 1000000"]),
        ("train.sequence_length=1000000000000", ["train.sequence_length", "from 1 to 16777216"]),
        ("model.layers=1_000_000_000", ["model.layers=1_000_000_000", "from 1 to 10000"]),
        ("optim.lr=1e-300", ["optim.lr=1e-300", "from 1e-12"]),
        ("optim.eps=0", ["optim.eps=0", "from 1e-30"]),
        ("optim.beta2=1", ["optim.beta2=1", "to less than 1"]),
        ("optim.clip=1e-300", ["optim.clip=1e-300", "must be 0, or a number from 1e-9"]),
        ("train.steps=" + "7" * 400, ["train.steps=777777777777...(400 characters)", "from 1 to 1000000000"]),
        ("mtp.depth_weights=[1,nan]", ["mtp.depth_weights=[1,nan]: nan must be"]),
        ("mtp.loss_weight_points=[[1B,-1]]", ["[[1B,-1]]: -1", "from 0"]),
        ("mtp.loss_weight_points=" + "[" * 30000, ["mtp.loss_weight_points", "list of list of number", "such as"]),
        ("train.compile=7", ["train.compile=7", "true or false"]),
        ("train.compile=1", ["train.compile=1", "such as train.compile=true"]),
        ("train.compile=maybe", ["train.compile=maybe", "true or false"]),
        ("mtp.curriculum=[[0,one]]", ["such as mtp.curriculum=[[0,1],[1e9,2]]"]),
        ("model.head_dim=wide", ["int or null", "such as model.head_dim=64"]),
        ("train.tokens=2Q", ["train.tokens=2Q", "such as train.tokens=2000000000"]),
    ],
)
def test_the_error_names_setting_value_and_what_is_right(override: str, words: list[str]) -> None:
    message = refusal("train", override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("root", "override"),
    [
        ("build_shards", "shard_mb=nan"), ("build_shards", "limit_mb=inf"), ("build_shards", "workers=-1"),
        ("generate", "decode.max_new_tokens=1000000000000000"), ("generate", "decode.temperature=1e-300"),
        ("generate", "decode.top_p=0"), ("evaluate", "temperatures=[0,inf]"), ("serve", "seconds=nan"), ("export", "shard_gb=0"),
        ("study", "seeds=[-1]"), ("study", "polynomials.modulus=1B"), ("plan", "world_memory_gib=nan"),
    ],
)  # fmt: skip
def test_the_rule_is_that_of_every_command(root: str, override: str) -> None:
    key, _, text = override.partition("=")
    assert refusal(root, override).startswith(f"{key}={text}")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("2B", int, 2 * 10**9), ("2b", int, 2 * 10**9), ("1.5M", int, 1_500_000), ("1k", int, 1000), ("1Ki", int, 1024),
        ("4ki", int, 4096), ("3T", int, 3 * 10**12), ("2G", int, 2 * 10**9), ("1_000", int, 1000), ("2e9", int, 2 * 10**9),
        ("+7", int, 7), ("-7", int, -7), (" 7 ", int, 7), ("null", int | None, None), ("0.1k", int, 100),
        ("3e-4", float, 3e-4), (".5", float, 0.5), ("5.", float, 5.0), ("1k", float, 1000.0), ("7", float, 7.0),
        ("true", bool, True), ("False", bool, False), ("on", bool, True), ("no", bool, False),
        ("[]", list[int], []), ("[1, 2k]", list[int], [1, 2000]), ("[[0,1],[1B,2]]", list[list[float]], [[0.0, 1.0], [1e9, 2.0]]),
    ],
)  # fmt: skip
def test_what_is_typed_is_what_is_meant(text: str, kind: Any, expected: Any) -> None:
    found = parsed(text, kind)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "text", ["", "1.5", "1e-3", "k", "1kk", "1 k", "0x10", "1__0", "_1", "1e9999", "true", "one", "1,2", "[1]", "²"]
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(NotANumberError):
        parsed(text, int)


@given(st.integers(-(10**30), 10**30))
def test_whole_numbers_are_exact(number: int) -> None:
    assert parsed(str(number), int) == number


@given(st.floats(allow_nan=False))
def test_numbers_are_those_of_python(number: float) -> None:
    assert parsed(repr(number), float) == number


@given(st.one_of(st.integers(), st.floats()), st.booleans())
def test_a_number_is_refused_exactly_where_it_is_out_of_bounds(number: float, zero: bool) -> None:
    bounds = Bounds(0.5, 100, zero=zero)
    within = math.isfinite(number) and (0.5 <= number <= 100 or (zero and number == 0))
    assert (fault(number, bounds, whole=False) is None) == within


def test_an_interpolation_shows_itself_and_not_what_it_stands_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    for override in ("optim.lr=${oc.env:A_SECRET}", "mtp.depth_weights=[${oc.env:A_SECRET}]", "train.compile=${oc.env:A_SECRET}"):
        message = refusal("train", override)
        assert "${oc.env:A_SECRET}" in message
        assert "hunter2" not in message
    with pytest.raises(UserError) as caught:
        changed(compose("train", TrainingRun, []), ["optim.lr=${oc.env:A_SECRET}"], "variants")
    assert "hunter2" not in str(caught.value)
    (tmp_path / "resolved.yaml").write_text("optim: {lr: '${oc.env:A_SECRET}'}\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "resolved.yaml", TrainingRun)
    assert "hunter2" not in str(caught.value)


def test_texts_in_a_list_are_taken_as_typed() -> None:
    typed = "[1_0, 1e3, true, 007, 'a, b', export X=${HOME}/lib, data/[0-9]*.txt]"
    expected = ["1_0", "1e3", "true", "007", "a, b", "export X=${HOME}/lib", "data/[0-9]*.txt"]
    assert compose("build_shards", ShardBuild, [f"input={typed}"]).input == expected
    assert changed(ShardBuild(), [f"input={typed}"], "here").input == expected
    config = compose("train", TrainingRun, ["launch.setup=[export X=${HOME}]"])
    assert config.launch.setup == ["export X=${HOME}"]


@pytest.mark.parametrize("text", ["a", "[a", "a]", "[a]]", "[[a]", "['a]", "[a],[b"])
def test_a_list_without_its_brackets_is_none(text: str) -> None:
    with pytest.raises(NotANumberError):
        parts(text, quotes="'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: {lr: .nan}", ["optim.lr=nan", "from 1e-12"]),
        ("optim: {lr: .inf}", ["optim.lr=inf"]),
        ("model: {layers: 1000000000}", ["model.layers=1000000000", "from 1 to 10000"]),
        ("train: {compile: 7}", ["train.compile=7", "true or false"]),
        ("train: {steps: many}", ["train.steps=many", "int or null"]),
        ("mtp: {depth_weights: [1, .nan]}", ["mtp.depth_weights", "nan must be"]),
        ("mtp: {curriculum: [[-1, 1]]}", ["mtp.curriculum", "-1", "from 0"]),
    ],
)
def test_the_rule_is_that_of_a_settings_file(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(content + "\n")
    with pytest.raises(UserError) as caught:
        load(path, TrainingRun)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_settings_file_may_say_2b(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("train: {tokens: 2B, sequence_length: 1Ki}\n")
    config = load(tmp_path / "resolved.yaml", TrainingRun)
    assert (config.train.tokens, config.train.sequence_length) == (2 * 10**9, 1024)
    save(config, tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml", TrainingRun) == config


def test_counts_have_suffixes_in_every_command() -> None:
    assert compose("train", TrainingRun, ["train.tokens=2B", "train.sequence_length=1k"]).train.sequence_length == 1000
    assert compose("generate", Generation, ["decode.max_new_tokens=1k"]).decode.max_new_tokens == 1000
    assert compose("evaluate", Evaluation, ["sequences=1Ki"]).sequences == 1024


SERVED = Served("m", vocabulary=100, longest=64, texts=4, max_tokens=16, temperature=0.0, top_k=0, top_p=1.0, stop=())


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_tokens", "seed"])
@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e400", "1e-300", "1" + "0" * 399, "-1", "1" * 5000, "true", "[]", '"1"'])
def test_the_rule_is_that_of_requests(name: str, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(f'{{"prompt": "a", "{name}": {text}}}'.encode(), SERVED, lambda text: [1])
    assert caught.value.status == 400
    assert len(caught.value.message) < 200
    assert name in caught.value.message or "5000 digits" in caught.value.message
    json.dumps(caught.value.as_dict())


def test_takes_number_names_numbers_and_flags() -> None:
    kinds = settings(TrainingRun)
    assert takes_number(kinds["train.steps"]) and takes_number(kinds["train.compile"]) and takes_number(kinds["mtp.curriculum"])
    assert not takes_number(kinds["tracker.tags"]) and not takes_number(kinds["tracker.name"])
