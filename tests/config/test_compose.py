"""Promise: settings are typed and known, or the user reads one line that names the setting and the way out."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from mtp_dist.config.compose import compose, config_groups, differences, load, save, settings
from mtp_dist.config.documentation import ROOTS
from mtp_dist.config.folder import conf_folder, groups
from mtp_dist.config.schema import Evaluation, Generation, ShardBuild, TrainingRun
from mtp_dist.errors import UserError


def refusal(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        compose("train", TrainingRun, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("root", ROOTS)
def test_every_command_composes_without_overrides(root: str) -> None:
    assert type(compose(root, ROOTS[root], [])) is ROOTS[root]


@pytest.mark.parametrize("root", ROOTS)
def test_every_option_of_every_group_says_what_its_file_says(root: str) -> None:
    options = {group: groups()[group] for group in config_groups(root)}
    over_all = {group: options.pop(group) for group in ("experiment", "study") if group in options}
    # One composition for the n-th option of all groups: groups do not meet, and composing one by one is slow.
    for number in range(max(map(len, options.values()), default=0)):
        chosen = {group: names[number % len(names)] for group, names in options.items()}
        config = compose(root, ROOTS[root], [f"{group}={option}" for group, option in chosen.items()])
        for group, option in chosen.items():
            assert_says(getattr(config, group), group, option)
    for group, names in over_all.items():
        for option in names:
            assert_says(compose(root, ROOTS[root], [f"{group}={option}"]), group, option)


def assert_says(node: object, group: str, option: str) -> None:
    content = OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{option}.yaml")) or {}
    assert isinstance(content, dict)
    content.pop("defaults", None)
    assert_holds(node, content, f"{group}={option}")


def assert_holds(node: object, content: dict, origin: str) -> None:
    for key, expected in content.items():
        found = getattr(node, key)
        if isinstance(expected, dict) and not isinstance(found, dict):
            assert_holds(found, expected, f"{origin}: {key}")
        elif isinstance(expected, dict):  # an option adds to what its defaults have
            assert expected.items() <= found.items(), f"{origin}: {key}"
        else:
            assert found == expected, f"{origin}: {key}"


def test_no_yaml_lies_outside_the_groups_that_commands_take() -> None:
    taken = {group for root in ROOTS for group in config_groups(root)}
    assert set(groups()) == taken
    assert {path.stem for path in conf_folder().glob("*.yaml")} == set(ROOTS)


def test_the_command_line_wins_over_the_experiment_and_the_experiment_over_the_groups() -> None:
    plain = compose("train", TrainingRun, ["experiment=quickstart"])
    assert (plain.parallel.pipeline, plain.parallel.schedule, plain.mtp.depth, plain.zero.stage) == (2, "zbv", 2, 1)
    changed = compose("train", TrainingRun, ["experiment=quickstart", "parallel=classic2", "mtp.depth=1", "train.steps=7"])
    assert (changed.parallel.schedule, changed.mtp.depth, changed.train.steps) == ("1f1b", 1, 7)
    assert changed.train.sequence_length == plain.train.sequence_length


def test_values_have_the_types_of_the_schema() -> None:
    config = compose(
        "train",
        TrainingRun,
        ["optim.lr=3e-4", "optim.eps=1", "mtp.loss_weight_points=[[1_000,0.1],[1e4,0]]", "parallel.placement=[2,2]"],
    )
    assert config.optim.lr == 3e-4
    assert isinstance(config.optim.eps, float)
    assert config.mtp.loss_weight_points == [[1000.0, 0.1], [10000.0, 0.0]]
    assert config.parallel.placement == "[2,2]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layer=3"], ["model.layer ", "model.layers"]),
        (["layers=3"], ["layers", "model.layers"]),
        (["parallel.pipline=2"], ["parallel.pipeline"]),
        (["+model.dmi=3"], ["model.dmi", "not a setting"]),
        (["+wholly=3"], ["wholly", "--help"]),
        (["+model.layers=3"], ["+model.layers=3", "write model.layers=3"]),
        (["++model.layers=3"], ["write model.layers=3"]),
        (["++model.dmi=3"], ["model.dmi", "not a setting"]),
        (["~model.layers="], ["cannot be removed"]),
        (["hydra.run.dir=x"], ["hydra.run.dir", "not a setting"]),
        (["model@mtp=tiny"], ["model@mtp", "not a setting"]),
        (["model.layers=abc"], ["model.layers=abc", "int"]),
        (["model.layers=1.5"], ["model.layers=1.5", "int"]),
        (["model.layers=null"], ["model.layers=null", "int"]),
        (["model.layers=1,2"], ["model.layers=1,2", "int"]),
        (["model.layers={"], ["model.layers={", "int"]),
        (["seed=1.5"], ["seed=1.5", "int"]),
        (["optim.lr="], ["optim.lr", "number"]),
        (["train.deterministic=maybe"], ["train.deterministic=maybe", "true or false"]),
        (["mtp.loss_weight_points=[[1,a]]"], ["list of list of number"]),
        (["mtp.loss_weight_points=[[1,2]"], ["mtp.loss_weight_points"]),
        (["optim.lr=${nowhere}"], ["optim.lr", "nowhere"]),
        (["model=smal"], ["model=smal", "did you mean small"]),
        (["model=1,2"], ["model=1,2", "tiny", "model.NAME"]),
        (["experiment=none"], ["experiment=none", "quickstart"]),
        (["train={steps: 3}"], ["train", "group of settings", "train.global_batch"]),
        (["model"], ["model", "key=value"]),
        (["=3"], ["key=value"]),
        (["mtp.depth=1", "optim.lr=1e-4", "model.heads=x"], ["model.heads=x", "int"]),
    ],
)
def test_bad_overrides_are_one_line_that_names_them(overrides: list[str], words: list[str]) -> None:
    message = refusal(overrides)
    for word in words:
        assert word in message


TEXTS = ["Hello, world: {x}", "def f(x):\n    return [x", "${price} \\${a} \\\\${b}", "it's", "a=b", "null", "", "tab\tend\\"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_typed(text: str) -> None:
    assert compose("generate", Generation, [f"prompt={text}", "decode.temperature=1"]).prompt == text


def test_text_may_be_quoted_as_hydra_wants_it_and_null_unsets_an_optional_text() -> None:
    assert compose("generate", Generation, ["prompt='a, b'"]).prompt == "a, b"
    assert compose("train", TrainingRun, ["tracker.name=mine"]).tracker.name == "mine"
    assert compose("train", TrainingRun, ["tracker.name=null"]).tracker.name is None


def test_a_setting_may_have_the_name_of_a_group_that_its_command_does_not_take() -> None:
    assert compose("evaluate", Evaluation, ["data=/data/set"]).data == "/data/set"
    assert compose("generate", Generation, ["checkpoint=runs/a/step_1"]).checkpoint == "runs/a/step_1"
    assert compose("build_shards", ShardBuild, ["input=[a.txt,b.txt]", "tokenizer=bytes"]).input == ["a.txt", "b.txt"]


def test_composing_leaves_no_hydra_state_behind() -> None:
    compose("train", TrainingRun, [])
    assert not GlobalHydra.instance().is_initialized()


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    overrides = ["experiment=quickstart", "mtp=deepseek_v3", "run_dir=${odd} \\${name}: é", "optim.lr=1e-5"]
    config = compose("train", TrainingRun, overrides)
    save(config, tmp_path / "sub" / "resolved.yaml")
    assert load(tmp_path / "sub" / "resolved.yaml", TrainingRun) == config
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["resolved.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model:\n  dmi: 3\n", ["model.dmi", "not a setting"]),
        ("modle:\n  layers: 3\n", ["modle", "did you mean model"]),
        ("model:\n  layers: many\n", ["model.layers", "int"]),
        ("model: 3\n", ["model", "group of settings"]),
        ("- 1\n", ["settings"]),
        ("model: [\n", ["YAML"]),
        ("mtp:\n  depth_weights: [a]\n", ["mtp.depth_weights", "number"]),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load(path, TrainingRun)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml does not exist"):
        load(tmp_path / "nothing.yaml", TrainingRun)


def test_differences_name_each_changed_setting() -> None:
    old = compose("train", TrainingRun, [])
    new = compose("train", TrainingRun, ["optim.lr=2", "parallel.placement=[4]"])
    assert differences(old, new) == [("parallel.placement", "balanced", "[4]"), ("optim.lr", 0.001, 2.0)]
    assert differences(old, old) == []


def test_every_setting_of_every_command_has_a_text() -> None:
    for cls in ROOTS.values():
        for key in settings(cls):
            owner: type = cls
            for name in key.split(".")[:-1]:
                owner = owner.__dataclass_fields__[name].type  # type: ignore[attr-defined]
            assert owner.__dataclass_fields__[key.split(".")[-1]].metadata["text"]  # type: ignore[attr-defined]


def test_whole_numbers_may_be_powers_of_ten() -> None:
    config = compose("train", TrainingRun, ["train.tokens=2e9", "train.steps=1.5e3"])
    assert (config.train.tokens, config.train.steps) == (2_000_000_000, 1500)
    with pytest.raises(UserError, match=r"train\.tokens=2\.5e0"):
        compose("train", TrainingRun, ["train.tokens=2.5e0"])


def test_whole_numbers_in_a_list_of_lists_are_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mtp: {loss_weight_points: [[1000, 1], [2000.5, 0]]}\n")
    assert load(tmp_path / "run.yaml", TrainingRun).mtp.loss_weight_points == [[1000.0, 1.0], [2000.5, 0.0]]
    (tmp_path / "run.yaml").write_text("mtp: {loss_weight_points: [7]}\n")
    with pytest.raises(UserError, match=r"mtp\.loss_weight_points"):
        load(tmp_path / "run.yaml", TrainingRun)


def test_a_run_saved_before_rows_were_mixed_keeps_its_order(tmp_path: Path) -> None:
    """The default of data.mix_tokens is for new runs; a file that lacks it is of an earlier version, whose order is 0's."""
    path = tmp_path / "resolved.yaml"
    save(TrainingRun(), path)
    text = path.read_text()
    assert load(path, TrainingRun).data.mix_tokens == TrainingRun().data.mix_tokens > 0
    path.write_text("".join(line for line in text.splitlines(keepends=True) if "mix_tokens" not in line))
    assert load(path, TrainingRun).data.mix_tokens == 0
