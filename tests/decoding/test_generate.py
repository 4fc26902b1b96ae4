"""The command: bad input is one line within moments; a checkpoint in, texts, a true table and JSON out."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from mtp_dist.checkpoint.draft_tokens import DRAFT_TOKENS
from mtp_dist.checkpoint.manifest import CONFIG, MANIFEST, TOKENIZER, FragmentRecord, Manifest, ParameterRecord, file_record
from mtp_dist.config import compose
from mtp_dist.config.command import application
from mtp_dist.config.schema import Generation, MTPConfig, TrainingRun
from mtp_dist.data.tokenizer import byte_tokenizer
from mtp_dist.decoding.marked_text import DRAFT, END, LEGEND
from mtp_dist.decoding.request import read_prompts
from mtp_dist.generate import run
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import random_model, taught

SENTENCE = "fox jumped gray "


def save(folder: Path, chunk: Chunk, mtp: MTPConfig, tokenizer: Tokenizer | None = None) -> Path:
    """A checkpoint of a byte-level model, as a one-process run leaves it, without the optimizer's moments."""
    folder.mkdir(parents=True)
    file = "rank_00000.safetensors"
    save_file({f"{name}.master": p.detach().flatten() for name, p in chunk.named_parameters()}, folder / file)
    compose.save(TrainingRun(model=chunk.model, mtp=mtp), folder / CONFIG)
    (tokenizer or byte_tokenizer()).save(str(folder / TOKENIZER))
    parameters = {
        name: ParameterRecord(
            list(p.shape), [FragmentRecord(file, name, [0] * p.dim(), list(p.shape), 0, p.numel())], moments=False
        )
        for name, p in chunk.named_parameters()
    }
    if chunk.draft_tokens is not None:
        (folder / DRAFT_TOKENS).write_text(json.dumps(chunk.draft_tokens.tokens.tolist()))
    files = {path.name: file_record(path) for path in folder.iterdir()}
    Manifest(60, {}, {}, asdict(mtp), {}, {}, {}, {}, parameters, files).write(folder / MANIFEST)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of a model that knows one sentence."""
    run_folder = tmp_path_factory.mktemp("run")
    chunk = taught(random_model(2, std=0.02, vocabulary=257 + 7), list(SENTENCE.encode()), steps=80)
    save(run_folder / "checkpoints" / "step_00000060", chunk, MTPConfig(depth=2))
    return run_folder


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain") / "step_1", random_model(0, vocabulary=257), MTPConfig(kind="none", depth=0))


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with another tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["fox"])
    folder = tmp_path_factory.mktemp("strange") / "step_1"
    return save(folder, random_model(0, vocabulary=258), MTPConfig(kind="none", depth=0), tokenizer)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        application("generate", Generation, run, argv=arguments)
    return int(exit_.value.code or 0)  # type: ignore[arg-type]


def test_both_modes_side_by_side(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    arguments = ["prompt=fox jump", "decode.mode=both", "decode.draft=3", "decode.max_new_tokens=40", f"output={output}"]
    assert command(f"checkpoint={checkpoint}", *arguments) == 0
    shown = re.sub(" +", " ", capsys.readouterr().out)
    content = json.loads(output.read_text())
    (prompt,) = content["prompts"]
    assert prompt["identical"] is True
    assert "greedy texts identical: yes" in shown
    assert ("fox jump" + prompt["plain"]["text"]) in shown
    assert shown.count("fox jump" + prompt["plain"]["text"]) == 1
    assert prompt["plain"]["text"].startswith("ed gray fox")
    assert prompt["plain"]["tokens"] == prompt["speculative"]["tokens"]
    plain, speculative = content["total"]["plain"], content["total"]["speculative"]
    assert (plain["forwards"], plain["tokens"], plain["tokens_per_forward"]) == (39, 40, 1.0)
    assert speculative["tokens"] == 40
    assert speculative["forwards"] < 39
    assert speculative["tokens_per_forward"] == 39 / speculative["forwards"]
    assert f"{speculative['tokens_per_forward']:.2f}" in shown
    assert len(speculative["acceptance"]) == 3
    assert f"accepted at depth 3 - {speculative['acceptance'][2]:.2f}" in shown
    assert content["speedup"] == speculative["tokens_per_second"] / plain["tokens_per_second"]


@pytest.mark.parametrize("more", [[], ["stream=true"]])
def test_accepted_drafts_have_a_color(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """The colour changes nothing else, and what has it is what the statistics call accepted."""
    arguments = [f"checkpoint={checkpoint}", "prompt=fox jump", "decode.max_new_tokens=40", *more]
    assert command(*arguments) == 0
    plain = capsys.readouterr().out
    assert DRAFT not in plain
    output = tmp_path / "out.json"
    assert command(*arguments, "color=always", f"output={output}") == 0
    shown = capsys.readouterr().out.replace(f"{LEGEND}\n", "")
    text = shown.partition("\n---")[0]
    (prompt,) = json.loads(output.read_text())["prompts"]
    found = prompt["speculative"]
    assert sum(found["drafts"]) == sum(found["statistics"]["accepted"]) > 0
    colored = "".join(re.findall(f"{re.escape(DRAFT)}(.*?){re.escape(END)}", text, re.DOTALL))
    assert colored == "".join(chr(t) for t, draft in zip(found["tokens"], found["drafts"], strict=True) if draft)
    assert text.replace(DRAFT, "").replace(END, "") == plain.partition("\n---")[0]


def test_prompts_of_a_file_sampled_with_a_seed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("to be\n---\n---\nor not\n to\n--- \n<|endoftext|>é\n")
    texts = []
    for seed in (7, 7, 8):
        arguments = [f"prompt_file={prompts}", f"seed={seed}", "decode=sampling", "decode.max_new_tokens=20", f"output={output}"]
        assert command(f"checkpoint={checkpoint}", *arguments) == 0
        results = json.loads(output.read_text())["prompts"]
        assert [item["prompt"] for item in results] == ["to be", "or not\n to", "<|endoftext|>é"]
        # The spelt-out name is text, byte by byte: prompts cannot end a document by accident.
        assert results[2]["prompt_tokens"] == list("<|endoftext|>é".encode())
        texts.append([item["speculative"]["tokens"] for item in results])
    assert texts[0] == texts[1] != texts[2]
    assert "prompt 3 of 3" in capsys.readouterr().out


def test_a_batch_of_json_lines_with_a_stop_string(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    written = ["fox jump", "gray fox jum", "a\n---\nfox", "gray"]
    prompts.write_text("\n".join(json.dumps(prompt) for prompt in written[:2]) + "\n\n" + "\n".join(map(json.dumps, written[2:])))
    texts = []
    for batch in (1, 3):
        arguments = [f"prompt_file={prompts}", f"decode.batch={batch}", "decode.max_new_tokens=30", f"output={output}"]
        assert command(f"checkpoint={checkpoint}", "decode.stop=[x jum]", *arguments) == 0
        results = json.loads(output.read_text())["prompts"]
        assert [item["prompt"] for item in results] == written
        texts.append([item["speculative"]["text"] for item in results])
        assert results[0]["speculative"]["ending"] == "stop_string"
        assert texts[-1][0] == "ed gray fo"
        assert f"fox jump{texts[-1][0]}\n--- prompt 2 of 4" in capsys.readouterr().out
    assert texts[0] == texts[1]


def test_draft_lengths_chosen_by_measurement(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    arguments = ["prompt=fox jump", "decode.mode=both", "decode.auto=true", "decode.draft=3", f"output={output}"]
    assert command(f"checkpoint={checkpoint}", *arguments, "decode.max_new_tokens=60") == 0
    (prompt,) = json.loads(output.read_text())["prompts"]
    assert prompt["identical"] is True
    drafted = prompt["speculative"]["statistics"]["drafted"]
    assert len(drafted) <= 3
    assert drafted == sorted(drafted, reverse=True)
    assert "drafts of 0 to 3 by 2 MTP modules" in capsys.readouterr().out


def test_a_text_can_be_watched_while_it_grows(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"checkpoint={checkpoint}", "prompt=fox jump", "decode.max_new_tokens=30", "decode.stop=[gray fox j]"]
    shown = []
    for stream in ("true", "false"):
        assert command(*arguments, f"stream={stream}") == 0
        shown.append(capsys.readouterr().out.split("\n--- step")[0])
    assert shown[0] == shown[1] == "--- prompt 1 of 1\nfox jumped "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=a"], "checkpoint is empty"),
        (["checkpoint={run}"], "prompt is empty and no prompt_file is given"),
        (["checkpoint={run}", "prompt_file=nowhere.txt"], "prompt_file=nowhere.txt cannot be read"),
        (["checkpoint={run}", "prompt_file={empty}"], "holds no prompt"),
        (["checkpoint={run}", "prompt_file={lines}"], "line 2 is not a JSON string of one or more characters"),
        (["checkpoint={run}", "prompt=a", "decode.batch=0"], "decode.batch=0 must be a whole number from 1"),
        (["checkpoint={run}", "prompt=a", "decode.stop=['']"], "decode.stop holds an empty string"),
        (["checkpoint={run}", "prompt=a", "stream=true", "decode.batch=2"], "choose decode.batch=1, not 2"),
        (["checkpoint={run}", "prompt=a", "stream=true", "decode.mode=both"], "choose decode.mode=plain or speculative"),
        (["checkpoint=nowhere", "prompt=a"], "checkpoint=nowhere does not exist"),
        (["checkpoint={tmp}", "prompt=a"], "holds no complete checkpoint"),
        (["checkpoint={run}", "prompt=a", "decode.temperature=-0.5"], "decode.temperature=-0.5 must be 0, or a number"),
        (["checkpoint={run}", "prompt=a", "decode.temperature=nan"], "decode.temperature=nan must be 0, or a number from 0.0001"),
        (["checkpoint={run}", "prompt=a", "decode.top_p=0"], "decode.top_p=0 must be a number from 1e-6 to 1"),
        (["checkpoint={run}", "prompt=a", "decode.top_p=1.5"], "decode.top_p=1.5 must be a number from 1e-6 to 1"),
        (["checkpoint={run}", "prompt=a", "decode.top_k=-1"], "decode.top_k=-1 must be a whole number from 0"),
        (["checkpoint={run}", "prompt=a", "decode.draft=0"], "decode.draft=0 must be a whole number from 1"),
        (["checkpoint={run}", "prompt=a", "decode.max_new_tokens=0"], "decode.max_new_tokens=0 must be a whole number from 1"),
        (["checkpoint={run}", "prompt=a", "decode.mode=fast"], "decode.mode=fast is not one of plain, speculative or both"),
        (["checkpoint={run}", "prompt=a", "decode.dtype=int8"], "decode.dtype=int8 is not one of"),
        (["checkpoint={run}", "prompt=a", "output={tmp}/no/out.json"], "cannot be written"),
        (["checkpoint={run}", "prompt=a", "decode.verify=all"], "decode.verify=all is not one of lossless or typical"),
        (["checkpoint={run}", "prompt=a", "decode.verify=typical"], "decode.temperature=0 has none; choose decode=sampling"),
        (["checkpoint={run}", "prompt=a", "decode.typical_epsilon=2"], "decode.typical_epsilon=2 must be a number from 0 to 1"),
        (["checkpoint={run}", "prompt=a", "decode.drafter=oracle"], "decode.drafter=oracle is not one of heads, ngram or model"),
        (["checkpoint={run}", "prompt=a", "decode.drafter=ngram", "decode.ngram=0"], "decode.ngram=0 must be a whole number"),
        (["checkpoint={run}", "prompt=a", "decode.drafter=model"], "decode.draft_model is empty"),
        (["checkpoint={run}", "prompt=a", "decode.draft_model={run}"], "is not read by decode.drafter=heads"),
        (["checkpoint={run}", "prompt=a", "decode.drafter=model", "decode.draft_model={other}"], "has another tokenizer"),
        (["checkpoint={run}", "prompt=a", "prompt_file={lines}"], "prompt is not read beside prompt_file="),
        (["checkpoint={run}", "prompt_file={half}"], "line 2 has half a character (\\ud800) at place 1"),
        (["checkpoint={run}", "prompt_file={deep}"], "line 1 is not a JSON string"),
        (["checkpoint={run}", "prompt_file=/dev/zero"], "prompt_file=/dev/zero is not a regular file"),
        (["checkpoint={run}", "prompt=a\udcff"], "prompt=a\\xff is not UTF-8"),
        (["checkpoint={run}", "prompt=a", "decode.mode=plain", "decode.tree=static"], "decode.tree=static has no effect"),
        (["checkpoint={run}", "prompt=a", "decode.mode=plain", "decode.draft=2"], "decode.draft=2 has no effect"),
        (["checkpoint={run}", "prompt=a", "decode.mode=plain", "decode.auto=true"], "decode.auto=true has no effect"),
        (["checkpoint={run}", "prompt=a", "decode.mode=plain", "decode.drafter=ngram"], "decode.drafter=ngram has no effect"),
        (["checkpoint={run}", "prompt=a", "decode.tree_nodes=5"], "decode.tree_nodes=5 has no effect: decode.tree=none"),
        (["checkpoint={run}", "prompt=a", "decode.tree=static", "decode.tree_width=0"], "a whole number from 1"),
        (["checkpoint={run}", "prompt=a", "decode.tree_nodes=3", "decode.tree=static", "decode.tree_shape=[[0]]"], "names every"),
        (["checkpoint={run}", "prompt=a", "decode.ngram=5"], "decode.ngram=5 has no effect: decode.drafter=heads"),
        (["checkpoint={run}", "prompt=a", "decode.top_k=5"], "decode.top_k=5 has no effect: decode.temperature=0"),
        (["checkpoint={run}", "prompt=a", "decode=sampling", "decode.typical_delta=0.5"], "verify=lossless has no such rule"),
        (["checkpoint={headless}", "prompt=a", "decode.mode=both"], "this model has none; choose decode.mode=plain"),
    ],
)
def test_bad_input_is_one_line_before_any_weight_is_read(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    headless: Path,
    strange: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "empty", None)  # weights cannot be loaded without it
    (tmp_path / "empty.txt").write_text("\n---\n\n")
    (tmp_path / "lines.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    places = {"run": checkpoint, "tmp": tmp_path, "headless": headless, "empty": tmp_path / "empty.txt"}
    places["other"] = strange
    places["lines"] = tmp_path / "lines.jsonl"
    for name, content in (("half", '"ok"\n"a\\ud800b"\n'), ("deep", "[" * 100_000)):
        places[name] = tmp_path / f"{name}.jsonl"
        places[name].write_text(content)
    assert command(*(argument.format(**places) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_model_without_heads_decodes_plainly(headless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"checkpoint={headless}", "prompt=a", "decode.mode=plain", "decode.max_new_tokens=3") == 0
    assert re.search(r"tokens per forward +1\.00\n", capsys.readouterr().out)


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_a_model_without_heads_is_helped_by_others(
    drafter: str, checkpoint: Path, headless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, drafts = tmp_path / "out.json", [f"decode.draft_model={checkpoint}"] if drafter == "model" else []
    arguments = ["prompt=fox jumped gray fox j", f"decode.drafter={drafter}", *drafts, "decode.mode=both", f"output={output}"]
    assert command(f"checkpoint={headless}", *arguments, "decode.max_new_tokens=20") == 0
    (prompt,) = json.loads(output.read_text())["prompts"]
    assert prompt["identical"] is True
    assert sum(prompt["speculative"]["statistics"]["drafted"]) > 0
    shown = {"ngram": "drafts of 4 by lookup in the text", "model": f"drafts of 4 by {checkpoint}"}
    assert shown[drafter] in capsys.readouterr().out


def test_settings_are_checked_without_loading_torch() -> None:
    code = "import sys, mtp_dist.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (("a.txt", "fox\n---\né\n"), ("a.jsonl", '"fox"\n"é"\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_prompts(Generation(prompt_file=str(tmp_path / name))) == ["fox", "é"]


def test_what_the_output_cannot_hold_or_take(checkpoint: Path) -> None:
    """ASCII alone, a full disk, a reader that leaves, an output that is closed: each in one process."""
    command = [sys.executable, "-m", "mtp_dist.generate", f"checkpoint={checkpoint}", "decode.max_new_tokens=3", "prompt=λ"]

    def shell(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
        line = f"{shlex.join(command)} {redirection}; echo status $? >&2"
        done = subprocess.run(["bash", "-c", line], env=os.environ | environment, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr
        return done

    ascii_only = shell("", PYTHONIOENCODING="ascii")
    assert ascii_only.stdout.startswith("--- prompt 1 of 1\n\\u03bb") and "status 0" in ascii_only.stderr
    for buffered in ("", "1"):
        full = shell("> /dev/full", PYTHONUNBUFFERED=buffered)
        last = ["error: the standard output cannot be written: No space left on device", "status 2"]
        assert full.stderr.splitlines()[-2:] == last
    assert "error" not in shell("| true").stderr
    assert "status 0" in shell(">&-").stderr
