"""pass@k of a checkpoint, or of completions in a file: ``python -m mtp_dist.evaluate task=humaneval
file=HumanEval.jsonl.gz``.

The model continues each problem's prompt `programs.samples` times; a completion ends where it leaves the function; the
program is called by the problem's tests, fenced in and from another process (``programs/sandbox.py``). Nothing runs without
programs.allow=true.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mtp_dist.checkpoint import folder
from mtp_dist.config import versions
from mtp_dist.config.compose import differences, require_numbers
from mtp_dist.config.rules import at_least, between, given
from mtp_dist.config.schema import DecodeConfig, Evaluation
from mtp_dist.decoding.request import given_of_drafts, refuse_unread_sampling, validate_decoding, validate_heads
from mtp_dist.errors import UserError
from mtp_dist.programs.pass_at_k import mean_pass_at_k
from mtp_dist.programs.problems import Problem, read_completions, read_problems, truncated
from mtp_dist.programs.sandbox import Limits, missing_fences, passes
from mtp_dist.quantity import counted


def run(config: Evaluation) -> int:
    """The command. Raises UserError before any program is written or run."""
    problems, completions = prepare(config)
    missing = missing_fences()
    print("warning: running programs that nobody has read, fenced in (programs.allow=true)", file=sys.stderr, flush=True)
    if missing:
        print(f"warning: this machine's fences lack {'; '.join(missing)}", file=sys.stderr, flush=True)
    written = completions if completions is not None else dict(write(config, problems))
    result = judge(config, problems, written)
    if config.output:
        try:
            Path(config.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={config.output} cannot be written: {error.strerror}") from None
    for name, value in result["pass_at_k"].items():
        each = counted(result["samples"], "program")
        print(f"pass@{name}: {100 * value:.1f} % of {counted(len(problems), 'problem')}, {each} each")
    return 0


def prepare(config: Evaluation) -> tuple[list[Problem], dict[str, list[str]] | None]:
    """The problems, and the completions of a file if there is one. Raises UserError."""
    versions.check()
    asked, decode = config.programs, config.decode
    given("file", config.file, "HumanEval.jsonl.gz (problems as JSON lines)")
    if not asked.allow:
        raise UserError(
            "task=humaneval runs programs that a model wrote and nobody has read; they are fenced in, but run it only where that "
            "is acceptable: programs.allow=true"
        )
    between("seed", config.seed, 0, 2**63 - 1)
    require_numbers(asked, "programs.")
    at_least("programs.memory_mb", asked.memory_mb, 64)
    validate_decoding(decode)
    refuse_unread_sampling(decode)
    if asked.completions:
        unread = [f"decode.{key}={value}" for key, value, _ in differences(decode, DecodeConfig())]
        unread += [f"programs.samples={asked.samples}"] * (asked.samples != 1) + [f"seed={config.seed}"] * (config.seed != 0)
        for typed in unread:
            raise UserError(f"{typed} has no effect beside programs.completions={asked.completions}; leave one of them out")
    problems = read_problems(config.file)
    completions = read_completions(asked.completions, problems) if asked.completions else None
    samples = asked.samples if completions is None else len(next(iter(completions.values())))
    for k in asked.k:
        if not 1 <= k <= samples:
            raise UserError(f"programs.k={k} must be from 1 to the {samples} programs of each problem")
    if completions is None:
        folder.sound(config.checkpoint)
        if decode.mode == "both":
            raise UserError("decode.mode=both is for generate; choose plain or speculative")
        if asked.samples > 1 and decode.temperature == 0:
            raise UserError(
                f"programs.samples={asked.samples} with decode.temperature=0 would be the same program each time; choose "
                "decode=sampling"
            )
    return problems, completions


def write(config: Evaluation, problems: list[Problem]) -> Iterator[tuple[str, list[str]]]:
    """(task, the model's completions) of each problem; sample s of problem p has a seed of its own."""
    import torch
    from tqdm import tqdm

    from mtp_dist.checkpoint.reader import open_checkpoint
    from mtp_dist.decoding.engine import NewText, continued
    from mtp_dist.generate import encode_prompts, load_writer

    decode, samples = config.decode, config.programs.samples
    try:
        validate_heads(decode, open_checkpoint(config.checkpoint).config.mtp)
    except UserError:
        if given_of_drafts(decode):
            raise
        # Without heads that can draft, one token a forward pass: the programs are the same.
        decode = replace(decode, mode="plain")
    _, writer = load_writer(config.checkpoint, decode, config.seed, device=config.launch.device)
    prompts = encode_prompts(writer.encoder, [problem.prompt for problem in problems])

    def new(number: int) -> NewText:
        generator = torch.Generator(writer.model.device).manual_seed(config.seed + number)
        return NewText(prompts[number // samples], decode.max_new_tokens, writer.stops, generator)

    found = continued(
        writer.model,
        map(new, range(len(problems) * samples)),
        writer.decode,
        rows=decode.batch,
        longest=max(map(len, prompts)) + decode.max_new_tokens,
        lengths=writer.lengths,
        **writer.told,
    )
    for problem, prompt in tqdm(list(zip(problems, prompts, strict=True)), desc="programs", unit="problem", disable=None):
        programs = [writer.text(prompt, done.tokens) for done in islice(found, samples)]
        yield problem.task, [truncated(program) for program in programs]


def judge(config: Evaluation, problems: list[Problem], written: dict[str, list[str]]) -> dict:
    """Run every program; pass@k and what passed, ready for JSON."""
    from tqdm import tqdm

    limits = Limits(config.programs.seconds, config.programs.memory_mb)
    passed = {
        problem.task: [passes(problem, text, limits) for text in written[problem.task]]
        for problem in tqdm(problems, desc="tests", unit="problem", disable=None)
    }
    samples, right = len(next(iter(passed.values()))), [sum(found) for found in passed.values()]
    return {
        "file": config.file,
        "checkpoint": config.checkpoint,
        "completions": config.programs.completions,
        "samples": samples,
        "pass_at_k": {str(k): mean_pass_at_k(right, samples, k) for k in config.programs.k},
        "problems": [
            {"task_id": task, "passed": found, "completions": written[task]} for task, found in passed.items()
        ],
    }
