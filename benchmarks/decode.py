"""Speculative decoding against plain decoding and against `transformers`, with one checkpoint, in one run.

    python -m benchmarks.decode runs/decode_benchmark datasets/decode_benchmark

Greedy, bfloat16, 128 tokens behind each of 64 prompts of 64 tokens; prompts come from held-out files that share no run of 32
tokens with the training files. An end-of-document token ends no text here, so that everybody writes as many tokens. Contestants
take turns, so that they meet the same machine, and the whole is repeated. At batch 1 a turn is a prompt; at batch 8 it is
`--turn` batches of prompts. This project is given all prompts of a turn and decodes eight side by side, the next one where a text
has ended; `transformers`' generate knows no such thing and gets eight prompts at a time (its generate_batch is no contestant).
Ours ends each turn with ever fewer texts side by side, where a run without turns does so once: turns cost us a little.
  plain       this project, one token a forward
  heads       this project, drafts by the model's own heads, `--draft` of them (default: D)
  auto        the same, the number of drafts chosen anew each round (up to `--draft`; default: as `decode.auto`)
  NAME        `--also NAME:key=value,..`: any other settings of `decode`
  hf plain    `transformers`' generate on an export of the same checkpoint
  hf use_mtp  the same with use_mtp=True (batch 1: it knows no other); each such call reads the modules' weights anew
  hf kept     the same, the modules kept from the first call on

Ratios are times of the rival over ours, of all prompts together, with 95 % intervals over prompts (at batch 8, over groups of
eight in the order of the prompts). Against plain the loop behind the prompt counts, for which E / (v(γ+1) + γ c) is what costs
measured in this run lead one to expect; against `transformers` the whole call counts. The time of a group that shared its turn
with others is its texts' share of each pass; the shares are scaled to the wall time of the turn, and the scale is printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.held_out_prompts import held_out_prompts
from benchmarks.timing import total_ratio
from mtp_dist.checkpoint.reader import Checkpoint, open_checkpoint
from mtp_dist.config.command import guarded
from mtp_dist.config.schema import DecodeConfig, Export
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.decoding.costs import Costs, measure
from mtp_dist.decoding.draft_lengths import DraftLengths
from mtp_dist.decoding.drafters import draft_length, most_nodes
from mtp_dist.decoding.engine import generate_batch
from mtp_dist.decoding.preparation import prepare
from mtp_dist.decoding.request import fitted, validate_decoding
from mtp_dist.decoding.statistics import Statistics, total
from mtp_dist.errors import UserError
from mtp_dist.export import export

Prompts = list[list[int]]
T = TypeVar("T")
ROUNDS = 16
"""Of drafts, before costs are measured."""


@dataclass
class Contestant:
    """``write`` continues prompts and returns their new tokens, and the statistics of each where it is ours. Then it is called
    with all prompts of a turn, else with a group at a time."""

    write: Callable[[Prompts], tuple[Prompts, list[Statistics] | None]]
    whole: bool = False
    seconds: list[float] = field(default_factory=list)
    """Of each group of prompts, the prompt's own pass included."""
    counted: list[Statistics] = field(default_factory=list)
    """Of each group."""
    texts: list[list[int]] = field(default_factory=list)
    """Of the first repetition."""
    tokens: int = 0

    def take_turn(self, prompts: Prompts, size: int) -> Prompts:
        """Continue the prompts in groups of that size, or so many side by side; the new tokens of each."""
        texts: Prompts = []
        for part in [prompts] if self.whole else groups(prompts, size):
            begin = time.perf_counter()
            found, counted = self.write(part)
            seconds = time.perf_counter() - begin
            texts += found
            if counted is None:
                self.seconds.append(seconds)
                continue
            sums = [total(group) for group in groups(counted, size)]
            scale = seconds / sum(each.prefill_seconds + each.seconds for each in sums)
            self.seconds += [scale * (each.prefill_seconds + each.seconds) for each in sums]
            self.counted += sums
        self.tokens += sum(map(len, texts))
        return texts

    @property
    def scale(self) -> float:
        """Wall time over the time that statistics tell."""
        return sum(self.seconds) / sum(part.prefill_seconds + part.seconds for part in self.counted)

    @property
    def loops(self) -> list[float]:
        """Seconds behind the prompts' pass of each group."""
        return [part.seconds for part in self.counted]


class Own:
    """This project's engine on one model."""

    def __init__(self, checkpoint: Checkpoint, config: DecodeConfig) -> None:
        self.model = prepare(checkpoint.load_model(getattr(torch, config.dtype)), config)
        self.vocabulary = vocabulary_size(load_tokenizer(checkpoint.tokenizer_path))

    def contestant(self, config: DecodeConfig, size: int) -> Contestant:
        """size: texts side by side."""
        lengths = DraftLengths(draft_length(config, self.model.depth)) if config.auto else None

        def write(prompts: Prompts) -> tuple[Prompts, list[Statistics]]:
            found = generate_batch(self.model, prompts, config, rows=size, vocabulary=self.vocabulary, lengths=lengths)
            return [text.tokens for text in found], [text.statistics for text in found]

        return Contestant(write, whole=True)

    def costs(self, prompts: Prompts, config: DecodeConfig) -> Costs:
        """In the middle of the texts, about."""
        drafts = draft_length(config, self.model.depth)
        return measure(self.model, prompts, config, drafts, vocabulary=self.vocabulary, rounds=ROUNDS)


class Theirs:
    """`transformers` on an export."""

    def __init__(self, folder: Path, layers: int, depth: int, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM
        from transformers.modeling_layers import MtpModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # What transformers' own classes of models with MTP modules declare.
        extra = [rf"model\.layers\.{layers + k}\..*" for k in range(depth)]
        LlamaForCausalLM._keys_to_ignore_on_load_unexpected = extra
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.modules, self.load = MtpModel, MtpModel.from_pretrained
        self.heads: Any = MtpModel.from_pretrained(self.model) if depth else None

    def contestant(self, tokens: int, *, kept: bool = False, **settings: Any) -> Contestant:
        """kept: generate gets modules that were loaded before, where it would load them."""

        def write(prompts: Prompts) -> tuple[Prompts, None]:
            given = torch.tensor(prompts)
            self.modules.from_pretrained = (lambda *_, **__: self.heads) if kept else self.load  # type: ignore[method-assign]
            with torch.inference_mode():
                found = self.model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, **settings
                )
            return found[:, given.shape[1] :].tolist(), None

        return Contestant(write)


def groups(items: list[T], size: int) -> list[list[T]]:
    """So many at a time."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def compete(
    contestants: dict[str, Contestant],
    turns: list[Prompts],
    size: int,
    repeats: int,
    between: Callable[[Prompts], None],
) -> None:
    """Everyone continues the prompts of every turn, in an order that turns round from turn to turn; ``between`` is called after
    each with every group of it. size: prompts of a group."""
    for contestant in contestants.values():
        contestant.write(turns[0][:size])  # threads and kernels start
    for repeat in range(repeats):
        for number, prompts in enumerate(turns):
            order = list(contestants)
            for name in order if (number + repeat) % 2 == 0 else reversed(order):
                texts = contestants[name].take_turn(prompts, size)
                if repeat == 0:
                    contestants[name].texts += texts
            for group in groups(prompts, size):
                between(group)


def report(contestants: dict[str, Contestant], modes: dict[str, DecodeConfig], costs: dict[str, list[Costs]], depth: int) -> None:
    """Print everything that was measured."""
    plain = contestants["plain"]
    for name, contestant in contestants.items():
        line = f"  {name:12} {contestant.tokens / sum(contestant.seconds):8.1f} tokens/s"
        if contestant.counted:
            found = total(contestant.counted)
            shares = " ".join(f"{100 * share:.0f}" for share in found.conditional_acceptance if share is not None)
            line += f", loop {found.tokens_per_second:8.1f}; {found.tokens_per_forward:.2f} tokens a forward"
            line += f"; accepted of those reached: {shares} %" if shares else ""
            line += f"; wall time / time counted {contestant.scale:.4f}"
        same = sum(own == other for own, other in zip(contestant.texts, plain.texts, strict=True))
        print(line + ("" if contestant is plain else f"; texts equal to plain: {same} of {len(plain.texts)}"))
    for name, config in modes.items():
        own = contestants[name]
        print(f"  plain / {name}, loop: {_interval(plain.loops, own.loops)}")
        if costs[name]:
            drafts = most_nodes(config, depth)
            forwards = total(own.counted).tokens_per_forward
            assert forwards is not None
            expected = statistics.median(each.speedup(forwards, drafts) for each in costs[name])
            pass_cost = statistics.median(each.curve[drafts] for each in costs[name])
            draft_cost = statistics.median(each.draft_cost for each in costs[name])
            measured = sum(plain.loops) / sum(own.loops)
            print(
                f"    expected {expected:.3f} of E={forwards:.2f}, γ={drafts}, v(γ+1)={pass_cost:.2f}, c={draft_cost:.3f};"
                f" measured / expected {measured / expected:.3f} (asked for: 0.9)"
            )
    if "hf plain" in contestants:
        theirs = contestants["hf plain"]
        print(f"  hf plain / plain, whole: {_interval(theirs.seconds, plain.seconds)} (asked for: 1)")
        for name in modes:
            print(f"  hf plain / {name}, whole: {_interval(theirs.seconds, contestants[name].seconds)}")
    for rival in ("hf use_mtp", "hf kept"):
        if rival in contestants:
            for name in modes:
                ratio = _interval(contestants[rival].seconds, contestants[name].seconds)
                print(f"  {rival} / {name}, whole: {ratio} (asked for: 1.5)")


def _interval(rival: list[float], own: list[float]) -> str:
    middle, low, high = total_ratio(rival, own)
    return f"{middle:.3f} (95 % interval {low:.3f} to {high:.3f}, {len(own)} pairs)"


def run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    checkpoint, data = open_checkpoint(options.checkpoint), Dataset.open(options.data)
    prompts = held_out_prompts(data, options.prompts, options.length)
    model, mtp = checkpoint.config.model, checkpoint.config.mtp
    base = DecodeConfig(
        max_new_tokens=options.tokens, stop_at_eos=False, dtype=options.dtype, int8=options.int8, compile=options.compile
    )
    modes = {
        "heads": replace(base, draft=options.draft),
        "auto": replace(base, draft=options.draft, auto=True),
    } | {name: replace(base, **settings) for name, settings in options.also}
    for config in modes.values():
        validate_decoding(config)
    modes = {name: fitted(config, mtp) for name, config in modes.items()}
    print(
        f"{checkpoint.path}: {mtp.kind}, D={mtp.depth}, {model.layers} layers of {model.hidden}, step {checkpoint.step};"
        f" {len(prompts)} prompts of {options.length} tokens, {options.tokens} new tokens, {options.dtype},"
        f" {torch.get_num_threads()} thread(s), {options.repeats} repetition(s)"
    )
    own = Own(checkpoint, base)
    with tempfile.TemporaryDirectory() as folder:
        theirs = None
        if options.transformers:
            out = export(Export(checkpoint=str(checkpoint.path), out=f"{folder}/export", dtype=options.dtype, heads=options.mtp))
            theirs = Theirs(out, model.layers, mtp.depth if options.mtp else 0, dtype)
        for size in options.batches:
            contestants = {"plain": own.contestant(replace(base, mode="plain"), size)}
            contestants |= {name: own.contestant(config, size) for name, config in modes.items()}
            if theirs is not None:
                contestants["hf plain"] = theirs.contestant(options.tokens)
                if options.mtp and size == 1:
                    contestants["hf use_mtp"] = theirs.contestant(options.tokens, use_mtp=True)
                    contestants["hf kept"] = theirs.contestant(options.tokens, kept=True, use_mtp=True)
            turns = groups(prompts, size * options.turn if size > 1 else 1)
            costs: dict[str, list[Costs]] = {name: [] for name in modes}
            _compete(own, contestants, modes, costs, turns, size, options.repeats)
            print(f"batch {size}:", flush=True)
            report(contestants, modes, costs, mtp.depth)


def _compete(
    own: Own,
    contestants: dict[str, Contestant],
    modes: dict[str, DecodeConfig],
    costs: dict[str, list[Costs]],
    turns: list[Prompts],
    size: int,
    repeats: int,
) -> None:
    turn, rounds = 0, sum(len(groups(prompts, size)) for prompts in turns) * repeats

    def between(prompts: Prompts) -> None:
        """Costs of one mode in turn, so that they meet the same machine as the texts."""
        nonlocal turn
        fixed = [name for name, config in modes.items() if not config.auto]
        period = max(1, rounds // (8 * len(fixed)))
        if turn % period == 0:
            name = fixed[turn // period % len(fixed)]
            costs[name].append(own.costs(prompts, modes[name]))
        turn += 1

    compete(contestants, turns, size, repeats, between)


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:key=value,key=value"""
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        current = getattr(DecodeConfig(), key, None)
        if key not in DecodeConfig.__dataclass_fields__:
            raise UserError(f"--also {text}: {key} is no setting of decode; see docs/configuration.md")
        if isinstance(current, bool):
            value = str(int(value == "true"))
        try:
            found[key] = value if isinstance(current, str) else float(value) if isinstance(current, float) else int(value)
        except ValueError:
            raise UserError(f"--also {text}: {key}={value} is no number") from None
    return name, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder")
    parser.add_argument("data", help="the dataset that it was trained on")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each text")
    parser.add_argument("--draft", type=int, default=None, help="drafts a round (default: D)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turn", type=int, default=4, help="batches of prompts that each contestant continues in one turn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--int8", action="store_true", help="decode.int8 of all of ours")
    parser.add_argument("--compile", action="store_true", help="decode.compile of all of ours")
    parser.add_argument("--also", action="append", default=[], metavar="NAME:key=value,..")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--no-mtp", dest="mtp", action="store_false", help="heads that transformers cannot hold are not exported")

    def main() -> int:
        options = parser.parse_args()
        options.also = [_settings(text) for text in options.also]
        run(options)
        return 0

    raise SystemExit(guarded(main))
