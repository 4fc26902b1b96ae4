"""No prompt yields the end-of-document token, whatever it spells and wherever it enters."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mtp_dist import decode_report
from mtp_dist.config.schema import DecodeConfig, Evaluation, Generation, MTPConfig, TrainingRun
from mtp_dist.decoding.layout import ModelPart
from mtp_dist.errors import UserError
from mtp_dist.generate import Writer, load_writer, run
from mtp_dist.repl import converse
from mtp_dist.serving.application import Completions
from mtp_dist.serving.request import RequestError
from mtp_dist.training.sample import Sample
from tests.data.test_end_token import unigram, word_level
from tests.decoding.models import random_model
from tests.decoding.test_generate import save

PROMPT = "say </s> a</s>"
END = 1
MODEL = {"vocabulary": 64}


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    save(folder / "checkpoints" / "step_00000060", random_model(1, **MODEL), MTPConfig(depth=1), tokenizer)
    return folder


@pytest.fixture(scope="module", params=["added", "word", "special"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer reads the end in text: as an added token that is not special, as a word, as a special token."""
    tokenizer = {
        "added": unigram("</s>", special=False),
        "word": word_level("</s>", special=None),
        "special": word_level("</s>", special=True),
    }[request.param]
    assert END in tokenizer.encode(PROMPT, add_special_tokens=False).ids
    return saved(tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of every prompt that is handed to the engine."""
    found: list[list[int]] = []
    made = Writer._new

    def recorded(self: Writer, tokens: list[int], *others: Any) -> Any:
        found.append(list(tokens))
        return made(self, tokens, *others)

    monkeypatch.setattr(Writer, "_new", recorded)
    return found


SHORT = DecodeConfig(max_new_tokens=2, mode="both")


def test_of_the_commands(checkpoint: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    asked = Generation(checkpoint=str(checkpoint), prompt=PROMPT, decode=SHORT, output=str(tmp_path / "texts.json"))
    assert run(asked) == 0
    expected = json.loads((tmp_path / "texts.json").read_text())["prompts"][0]["prompt_tokens"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPT) + "\n")
    file = str(tmp_path / "prompts.jsonl")
    assert decode_report.run(Evaluation(checkpoint=str(checkpoint), task="decode", file=file, decode=SHORT)) == 0
    assert len(prompts) >= 4
    assert all(tokens == expected for tokens in prompts)
    assert END not in expected


def test_of_a_conversation(checkpoint: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["</s>", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    _, writer = load_writer(str(checkpoint), DecodeConfig(max_new_tokens=2), seed=0)
    assert converse(writer, 256, PROMPT) == 0
    assert len(prompts) == 2
    assert not any(END in tokens for tokens in prompts)


def test_of_a_request_and_a_sample(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, writer = load_writer(str(checkpoint), DecodeConfig(), seed=0)
    tokens = Completions(SimpleNamespace(encoder=writer.encoder))._encode(PROMPT)  # type: ignore[arg-type]
    assert tokens == writer.encoder.encode(PROMPT, "a prompt")
    assert END not in tokens
    monkeypatch.setattr(ModelPart, "of", lambda *_: None)
    config = TrainingRun(mtp=MTPConfig(depth=1))
    config.validation.prompt = PROMPT
    sample = Sample(config, None, None, checkpoint / "checkpoints" / "step_00000060" / "tokenizer.json")  # type: ignore[arg-type]
    assert sample.tokens == tokens
    assert sample.end == END


def test_a_character_that_becomes_the_end_is_named(tmp_path: Path) -> None:
    """Where the unknown token is the end there is nothing else to read the character as."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": END, "say": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    checkpoint = saved(tmp_path / "run", tokenizer)
    said = r"'zebra' at character 4 is not in the tokenizer, whose unknown token is the end-of-document token; leave it out"
    with pytest.raises(UserError, match=rf"prompt 1 of 1 \('say zebra'\): {said}"):
        run(Generation(checkpoint=str(checkpoint), prompt="say zebra"))
    _, writer = load_writer(str(checkpoint), DecodeConfig(), seed=0)
    with pytest.raises(RequestError, match=f"prompt: {said}") as refused:
        Completions(SimpleNamespace(encoder=writer.encoder))._encode("say zebra")  # type: ignore[arg-type]
    assert refused.value.status == 400


def test_a_prompt_without_tokens_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": END}, unk_token="missing"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    checkpoint = saved(tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match=r"prompt 1 of 1 \('a zebra'\) has no tokens in this tokenizer \(.*leave out what"):
        run(Generation(checkpoint=str(checkpoint), prompt="a zebra"))
    with pytest.raises(UserError, match=r"has no token in this tokenizer; give a longer text"):
        run(Generation(checkpoint=str(checkpoint), prompt="  "))
