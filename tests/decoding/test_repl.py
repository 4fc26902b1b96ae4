"""A text written in turns: what is shown is what is continued, from a pipe as from a terminal."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, Generation, MTPConfig, ParallelConfig
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.engine import generate
from mtp_dist.decoding.request import validate
from mtp_dist.errors import UserError
from mtp_dist.generate import load_writer
from mtp_dist.repl import converse
from tests.decoding.models import random_model, taught
from tests.decoding.test_generate import SENTENCE, save

VOCABULARY, END = 257, 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chunk = taught(random_model(2, std=0.02, vocabulary=VOCABULARY), list(SENTENCE.encode()), steps=60)
    return save(tmp_path_factory.mktemp("repl") / "step_1", chunk, MTPConfig(depth=2))


@pytest.fixture(scope="module")
def solo(checkpoint: Path) -> Callable[..., str]:
    model, tokenizer = Checkpoint(checkpoint).load_model(), byte_tokenizer()

    def write(prompt: str, tokens: int, **settings: object) -> str:
        config = DecodeConfig(max_new_tokens=tokens, **settings)  # type: ignore[arg-type]
        return tokenizer.decode(generate(model, list(prompt.encode()), config, end=END, vocabulary=VOCABULARY).tokens)

    return write


Talk = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def talk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Lines in, the standard output and the notes out."""

    def run(*lines: str, beginning: str = "", **decode: object) -> tuple[str, list[str]]:
        waiting = iter(lines)

        def read(prompt: str) -> str:
            assert prompt == ""
            for line in waiting:
                if line == "^C":
                    raise KeyboardInterrupt
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)
        _, writer = load_writer(str(checkpoint), DecodeConfig(max_new_tokens=12, **decode), seed=0)  # type: ignore[arg-type]
        assert converse(writer, 256, beginning) == 0
        said = capsys.readouterr()
        return said.out, said.err.splitlines()

    return run


def test_each_line_continues_the_text(talk: Talk, solo: Callable[..., str]) -> None:
    first = "fox" + solo("fox", 12)
    second = first + " gray" + solo(first + " gray", 12)
    third = second + solo(second, 12)
    assert talk(" gray", "", "/text", beginning="fox") == (
        f"{first}\n{second.removeprefix(first)}\n{third.removeprefix(second)}\n{third}\n",
        [],
    )


def test_commands(talk: Talk, solo: Callable[..., str]) -> None:
    lines = ["fox", "/length 5", "/reset", "", "ray", "/temperature 2", "/temperature 0", "/reset", "a\\", "b", "/quit", "x"]
    said, notes = talk(*lines)
    assert said == f"fox{solo('fox', 12)}\nray{solo('ray', 5)}\na\nb" + solo("a\nb", 5) + "\n"
    empty = "[the text is empty; type its beginning, or /help]"
    assert notes == ["[max_new_tokens 5]", empty, "[temperature 2.0]", "[temperature 0.0]"]


def test_wrong_commands_change_nothing(talk: Talk, solo: Callable[..., str]) -> None:
    said, notes = talk("/temperature hot", "/length", "/length 0", "/temperature -1", "/lenght 3", "^C", "/help", "fox")
    assert said == f"fox{solo('fox', 12)}\n"
    assert notes[:6] == [
        "[hot is no number]",
        "[nothing is no whole number]",
        "[decode.max_new_tokens=0 must be a whole number from 1 to 1000000]",
        "[decode.temperature=-1.0 must be 0, or a number from 0.0001 to 100]",
        "[/lenght is no command; /help lists them (a space before the slash makes it text)]",
        "[Ctrl-D or /quit leaves]",
    ]
    assert "it does not chat" in notes[6]


def test_a_temperature_changes_the_text(talk: Talk, solo: Callable[..., str]) -> None:
    """Seeded: the same lines give the same text."""
    lines = ("/temperature 1.5", "/length 60", "fox")
    assert talk(*lines) == talk(*lines)
    assert talk(*lines)[0] != f"fox{solo('fox', 60)}\n"


def test_a_stop_string_is_no_part_of_the_text(talk: Talk, solo: Callable[..., str]) -> None:
    whole = "fox" + solo("fox", 12)
    stop = whole[8:10]
    said, _ = talk("fox", "/text", stop=[stop])
    cut = whole[: whole.index(stop, 3)]
    assert said == f"{cut}\n{cut}\n"


def test_a_text_that_grows_too_long_is_noted_once(talk: Talk) -> None:
    _, notes = talk("x" * 250, "", "", "/reset", "x" * 250)
    assert [note[:30] for note in notes] == ["[the text passes 256 tokens, w"] * 2


def test_a_pipe(checkpoint: Path, solo: Callable[..., str]) -> None:
    """The command. Half a line at the end of the input counts."""
    done = subprocess.run(
        [sys.executable, "-m", "mtp_dist.generate", f"checkpoint={checkpoint}", "interactive=true", "decode.max_new_tokens=12"],
        input="fox\n/reset\ngray", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"fox{solo('fox', 12)}\ngray{solo('gray', 12)}\n")


def test_a_terminal(checkpoint: Path, solo: Callable[..., str]) -> None:
    """Ctrl-C ends a text, which stays; Ctrl-D ends the program."""
    settings = [f"checkpoint={checkpoint}", "interactive=true", "decode.max_new_tokens=90000"]
    command = [sys.executable, "-m", "mtp_dist.generate", *settings]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""

    def until(word: str, after: int = 0) -> int:
        nonlocal seen
        while word not in seen[after:]:
            seen += os.read(ours, 4096).decode(errors="replace")
        return seen.index(word, after) + len(word)

    try:
        place = until("> ", until("it does not chat"))
        os.write(ours, b"fox\n")
        place = until(solo("fox", 30), place)
        process.send_signal(signal.SIGINT)
        place = until("> ", place)
        os.write(ours, b"/length 3\n/reset\ngray\n")
        place = until("gray" + solo("gray", 3), until("[max_new_tokens 3]", place))
        until("> ", place)
        os.write(ours, b"\x04")
        for _ in range(1000):
            if process.poll() is not None:
                break
            time.sleep(0.02)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt_file": "a.txt"}, "prompt_file=a.txt is not read with interactive=true"),
        ({"output": "a.json"}, "output=a.json is not read"),
        ({"decode": DecodeConfig(mode="both")}, "choose decode.mode=plain or speculative"),
        ({"decode": DecodeConfig(batch=2)}, "choose decode.batch=1, not 2"),
        ({"parallel": ParallelConfig(pipeline=2)}, "this layout has 2 processes; choose parallel=single"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        validate(Generation(checkpoint="somewhere", interactive=True, **settings))


def test_a_line_that_is_no_text_is_named_and_the_next_one_counts(checkpoint: Path, solo: Callable[..., str]) -> None:
    """From a pipe: bytes that are not UTF-8, read together with good lines; also where Python would read ASCII."""
    settings = [f"checkpoint={checkpoint}", "interactive=true", "decode.max_new_tokens=5"]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-m", "mtp_dist.generate", *settings],
            input=b"abc\xff\n\xc3\nfox\n", env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=300,
        )  # fmt: skip
        assert (done.returncode, done.stdout.decode()) == (0, f"fox{solo('fox', 5)}\n")
        assert [line for line in done.stderr.decode().splitlines() if not line.startswith("note: loading")] == [
            "[the line is not UTF-8: byte 0xff at place 3, counted from 0; give it as UTF-8]",
            "[the line is not UTF-8: byte 0xc3 at place 0, counted from 0; give it as UTF-8]",
        ]
