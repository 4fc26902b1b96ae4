"""Promise: who writes another trainer's name, or nearly ours, reads which setting it is."""

import pytest

from mtp_dist.config.compose import compose, settings
from mtp_dist.config.documentation import ROOTS
from mtp_dist.config.suggestions import SYNONYMS
from mtp_dist.errors import UserError


@pytest.mark.parametrize(
    ("root", "key", "meant"),
    [
        ("train", "optim.learning_rate", "optim.lr"),
        ("train", "learning_rate", "optim.lr"),
        ("train", "train.lr", "optim.lr"),
        ("train", "lr", "optim.lr"),
        ("train", "batch_size", "train.global_batch"),
        ("train", "train.batch-size", "train.global_batch"),
        ("train", "seq_len", "train.sequence_length"),
        ("train", "max_seq_length", "train.sequence_length"),
        ("train", "warmup", "schedule.warmup_tokens"),
        ("train", "schedule.warmup_steps", "schedule.warmup_tokens"),
        ("train", "dp", "parallel.data"),
        ("train", "parallel.tp", "parallel.tensor"),
        ("train", "pp", "parallel.pipeline"),
        ("train", "num_hidden_layers", "model.layers"),
        ("train", "save_every", "checkpoint.every_steps"),
        ("train", "checkpoint.interval", "checkpoint.every_steps"),
        ("train", "validation.steps_every", "validation.every_steps"),
        ("train", "wandb.project", "tracker.project"),
        ("train", "layers", "model.layers"),
        ("train", "parallel.pipline", "parallel.pipeline"),
        ("train", "optim.learning_rat", "optim.lr"),
        ("generate", "temperature", "decode.temperature"),
        ("generate", "batch_size", "decode.batch"),
        ("generate", "max_tokens", "decode.max_new_tokens"),
        ("evaluate", "batch_size", "micro_batch"),
        ("export", "output_dir", "out"),
    ],
)
def test_a_name_of_another_trainer(root: str, key: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(root, ROOTS[root], [f"{key}=3"])
    message = str(caught.value)
    assert message.startswith(f"{key} is not a setting of {ROOTS[root].__name__}; did you mean ")
    assert meant in message.partition("did you mean ")[2].rstrip("?").split(" or ")


def test_a_name_that_nothing_is_like_points_to_the_help() -> None:
    with pytest.raises(UserError, match="--help lists them all"):
        compose("train", ROOTS["train"], ["wholly=3"])


def test_synonyms_are_of_settings_that_exist_and_are_none_themselves() -> None:
    known = {key for schema in ROOTS.values() for key in settings(schema)}
    assert set(SYNONYMS) <= known
    for key, names in SYNONYMS.items():
        assert len(set(names)) == len(names), key
        assert key.rpartition(".")[2] not in names, key
