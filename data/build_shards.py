"""Make a dataset of tokenised shards: `python data/build_shards.py source=... out=...`; see `--help` and docs/data-format.md."""

import sys
from collections.abc import Sequence

from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.schema import ShardBuild
from mtp_dist.data.build_settings import check_settings
from mtp_dist.quantity import counted

EXAMPLES = (
    "python data/build_shards.py out=runs/stdlib",
    "python data/build_shards.py source=text input=[books/] separator=END out=runs/books tokenizer.vocab_size=8192",
    """python data/build_shards.py source=jsonl "input=['crawl/*.jsonl.gz']" field=content out=runs/crawl tokenizer=bytes""",
)


def typed(arguments: Sequence[str]) -> set[str]:
    """The settings that a command line names."""
    return {word.partition("=")[0] for word in arguments}


def run(config: ShardBuild) -> None:
    """Build, or find complete, the dataset that `config` describes, and say what it holds."""
    versions.check()
    check_settings(config, typed(sys.argv[1:]))
    # Here, so that --help and a bad setting are answered without loading torch (which webdataset imports).
    if config.out:
        print(f"dataset {config.out} from source={config.source}", flush=True)
    from mtp_dist.data.building import build
    from mtp_dist.data.sources.unread import printable

    dataset, fresh = build(config)
    print(f"dataset {printable(dataset.path)} {'built' if fresh else 'is complete already; nothing to do'}")
    for split in dataset.splits.values():
        tokens, shards = counted(split.tokens, "token"), counted(len(split.shards), "shard")
        print(f"  {split.name}: {counted(split.documents, 'document')}, {tokens}, {shards}")
        if not split.documents and config.validation_share:
            print(f"  note: no document's name hashed into {split.name}; give more documents or another validation_share")
    print(f"  tokenizer: {counted(dataset.vocab_size, 'entry', 'entries')}, {dataset.eos_token} = {dataset.eos_id}")


if __name__ == "__main__":
    application("build_shards", ShardBuild, run, examples=EXAMPLES)
