"""Real text for the experiments that need it: Python's standard library, which every machine has, as shards; and what a model
trained on it is measured by."""

import math
from pathlib import Path

import torch

from mtp_dist.config.heads import lookahead
from mtp_dist.config.schema import ShardBuild, Study, TokenizerConfig
from mtp_dist.data.building import build
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.detokenizer import decoded
from mtp_dist.data.rows import Rows
from mtp_dist.data.stream import training_stream
from mtp_dist.data.token_counts import most_frequent, token_counts
from mtp_dist.data.tokenizer import load_tokenizer
from mtp_dist.parallel.budget import flops_per_token
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.studies.experiment import Outcome
from mtp_dist.studies.matching import parameters
from mtp_dist.studies.training import Trained, train
from mtp_dist.training.held_out import HeldOut

TEXT_EXPERIMENTS = ("heads", "schedules", "chaining")


def dataset(config: Study) -> Dataset:
    """The one of data.path, or one built now below run_dir, with `config.tokenizer`. Raises UserError."""
    if config.data.path:
        return Dataset.open(config.data.path)
    kind = config.tokenizer.kind
    # A study's vocabulary size is for its trained tokenizers; a variant of bytes has no use for it.
    tokenizer = config.tokenizer if kind == "bpe" else TokenizerConfig(kind=kind, path=config.tokenizer.path)
    name = f"bpe{config.tokenizer.vocab_size}" if kind == "bpe" else kind
    wanted = ShardBuild(
        source="python_stdlib",
        out=str(Path(config.run_dir) / "data" / name),
        limit_mb=config.text.limit_mb,
        tokenizer=tokenizer,
    )
    return build(wanted)[0]


def vocabulary(config: Study) -> int | None:
    """Entries of the text's tokenizer; None for made-up tasks. Builds the text where it is not there yet."""
    return dataset(config).vocab_size if config.experiment in TEXT_EXPERIMENTS else None


def trained_on_text(config: Study, mesh: Mesh) -> Outcome:
    """Train on the text, then measure on its held-out rows."""
    data = dataset(config)
    return tested_on_text(learned(data, config, mesh), data, config)


def learned(data: Dataset, config: Study, mesh: Mesh) -> Trained:
    """Train on the text."""
    stream = training_stream(data, config, replica=0, replicas=1)
    number = config.mtp.draft_vocabulary
    listed = None if number is None else most_frequent(token_counts(data), number)
    trained = train(config, mesh, lambda step: stream.next()[0], draft_tokens=listed)
    stream.close()
    return trained


def tested_on_text(trained: Trained, data: Dataset, config: Study) -> Outcome:
    """Measure on held-out rows. Numbers:

    `loss` (nats a token) and `bits` (a byte of text) of the main head; `accepted_k`: share of right targets at depth k where the
    main head and all shallower depths are right, a forecast of a greedy decoder's acceptance; `gain`: tokens a forward pass that
    this makes, 1 + the mean number of drafts that are right; `gain_bytes`: the same in bytes of text; `parameters` in all;
    `flops` of forward and backward a token; `seconds`: median of the optimizer steps.
    """
    totals = HeldOut(trained.workload, data, "validation", config.text.sequences).run(config.train.micro_batch, 1)
    means, size = totals.means(), bytes_per_token(data, config)
    accepted = means["conditional"][1:]
    gain = 1 + sum(math.prod(accepted[: k + 1]) for k in range(len(accepted)))
    numbers = {
        "loss": means["loss"][0],
        "bits": means["loss"][0] / math.log(2) / size,
        "accuracy": means["accuracy"][0],
        "gain": gain,
        "gain_bytes": gain * size,
        "parameters": parameters(config) / 1e6,
        "flops": flops_per_token(config) / 1e6,
        "seconds": trained.seconds,
    }
    numbers |= {f"accepted_{k}": value for k, value in enumerate(accepted, start=1)}
    return Outcome(numbers, {"loss": trained.curve})


def bytes_per_token(data: Dataset, config: Study) -> float:
    """Of the held-out text (its first rows)."""
    rows = Rows(data, "validation", config.train.sequence_length, lookahead(config.mtp))
    tokens = rows.read(0, min(len(rows), config.text.sequences)).tokens[:, : config.train.sequence_length].flatten()
    text = decoded(load_tokenizer(data.tokenizer_path), tokens.tolist())
    return len(text.encode()) / int(torch.count_nonzero(tokens != data.eos_id))
