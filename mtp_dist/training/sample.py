"""A text that the model continues while it is trained, by the ranks and chunks that train it; nothing that training reads is
touched. Greedy, with drafts where the heads can make them, so that tokens a forward can be watched."""

import contextlib
import re
from pathlib import Path

from torch import nn

from mtp_dist.config.schema import DecodeConfig, TrainingRun
from mtp_dist.data.detokenizer import decoded
from mtp_dist.data.encoder import TextEncoder
from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.decoding.engine import generate
from mtp_dist.decoding.layout import ModelPart
from mtp_dist.decoding.request import DRAFTING
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.tracking import names


def shown(prompt: str, text: str) -> str:
    """A prompt and its continuation for a console: runs of empty lines are counted instead of printed, and so is a continuation
    of white space alone, which models write at first. The file has the exact text."""
    if not text.strip():
        return f"{prompt.strip()} [white space alone: {len(text)} characters, {text.count(chr(10))} line breaks]"
    folded = re.sub(r"\n(?:[^\S\n]*\n){2,}", lambda run: f"\n[{run[0].count(chr(10)) - 1} empty lines]\n", prompt + text)
    return folded.strip("\n")


class Sample:
    """`validation.prompt` and what follows. Every method is collective; the first replica writes."""

    def __init__(self, config: TrainingRun, mesh: Mesh, chunks: nn.ModuleList, tokenizer: Path) -> None:
        """Raises UserError, the same on every rank, where the prompt has no token."""
        self.prompt, self.mesh, self.part = config.validation.prompt, mesh, ModelPart.of(chunks, mesh)
        self.tokenizer = load_tokenizer(tokenizer)
        encoder = TextEncoder.of_run(tokenizer, config.tokenizer.eos_token)
        self.tokens, self.end = encoder.encode(self.prompt, f"validation.prompt={self.prompt!r}"), encoder.end_id
        drafts = config.mtp.kind in DRAFTING and config.mtp.stride == 1
        mode = "speculative" if drafts else "plain"
        self.decode = DecodeConfig(mode=mode, max_new_tokens=config.validation.prompt_tokens)
        self.folder = Path(config.run_dir) / "samples"

    def write(self, step: int) -> tuple[str, dict[str, float]]:
        """The continuation, and its metrics; rank 0 also keeps the text in run_dir/samples/step_N.txt. Nothing on the ranks of
        other replicas, which go on."""
        if self.mesh.data_rank > 0:
            return "", {}
        found = generate(
            self.part,
            self.tokens,
            self.decode,
            end=self.end,
            vocabulary=vocabulary_size(self.tokenizer),
        )
        text = decoded(self.tokenizer, found.tokens, self.tokens)
        if self.mesh.rank == 0:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop training
                self.folder.mkdir(exist_ok=True)
                (self.folder / f"step_{step:08d}.txt").write_text(self.prompt + text + "\n", encoding="utf-8")
        rate = found.statistics.tokens_per_forward
        return text, {} if rate is None or self.decode.mode == "plain" else {names.VALIDATION_TOKENS_PER_FORWARD: rate}
