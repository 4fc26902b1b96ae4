"""Every experiment in a tiny size, in one process: ``python -m tests.studies.tiny FOLDER`` writes
FOLDER/<experiment>/results.json and the rest; in seconds. What the tests of ``test_study.py`` read."""

import sys
from pathlib import Path

from mtp_dist.config.compose import compose
from mtp_dist.config.schema import Study
from mtp_dist.config.study import EXPERIMENTS, options
from mtp_dist.study import measured, prepare, world_of_one, write

COMMON = [
    "seeds=[1,2]",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.kv_heads=2",
    "model.mlp=48",
    "schedule.warmup_tokens=0",
    "launch.device=cpu",
]
TEXT = [
    "train.steps=2",
    "train.global_batch=4",
    "train.micro_batch=4",
    "data.lanes=4",
    "text.limit_mb=2",
    "text.sequences=16",
    "tokenizer.vocab_size=300",
    "tokenizer.train_bytes=200000",
]
TINY = {
    "choice_points": [
        "train.steps=120",
        "train.global_batch=32",
        "train.micro_batch=32",
        "optim.lr=0.01",
        "choice_points.rows=8",
        "choice_points.branches=4",
    ],
    "path_star": ["train.steps=3", "path_star.test_rows=8", "only=[none,parallel]"],
    "induction": ["train.steps=3", "induction.test_rows=8", "only=[none,sequential]"],
    "polynomials": ["train.steps=3", "polynomials.test_rows=8", "only=[none,parallel]"],
    "heads": [*TEXT, "text.prompts=2", "text.new_tokens=6", "only=[none_matched,sequential_matched,parallel_matched]"],
    "schedules": [*TEXT, "only=[none,bytes_none]"],
    "chaining": [*TEXT, "text.prompts=2", "text.new_tokens=6", "only=[true_tokens,sampled_always,own_matrices]"],
}


def composed(settings: list[str]) -> Study:
    return compose("study", Study, options(settings))


def main() -> None:
    folder = Path(sys.argv[1])
    ready = {
        name: prepare(composed([f"experiment={name}", *COMMON, *TINY[name], f"run_dir={folder / name}"])) for name in EXPERIMENTS
    }
    with world_of_one(next(iter(ready["choice_points"].values()))) as mesh:
        for name, variants in ready.items():
            write(measured(variants, mesh), folder / name, "tiny")


if __name__ == "__main__":
    main()
