"""Make a dataset of tokenised shards: `python data/build_shards.py source=... out=...`; see `--help` and docs/data-format.md."""

from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.schema import ShardBuild
from mtp_dist.quantity import counted

EXAMPLES = (
    "python data/build_shards.py out=runs/stdlib",
    "python data/build_shards.py source=text input=[books/] separator=END out=runs/books tokenizer.vocab_size=8192",
    """python data/build_shards.py source=jsonl "input=['crawl/*.jsonl.gz']" field=content out=runs/crawl tokenizer=bytes""",
)


def run(config: ShardBuild) -> None:
    """Build, or find complete, the dataset that `config` describes, and say what it holds."""
    versions.check()
    # Here, so that --help and a bad setting are answered without loading torch (which webdataset imports).
    from mtp_dist.data.building import build

    dataset, fresh = build(config)
    print(f"dataset {dataset.path} {'built' if fresh else 'is complete already; nothing to do'}")
    for split in dataset.splits.values():
        tokens, shards = counted(split.tokens, "token"), counted(len(split.shards), "shard")
        print(f"  {split.name}: {counted(split.documents, 'document')}, {tokens}, {shards}")
        if not split.documents and config.validation_share:
            print(f"  note: no document's name hashed into {split.name}; give more documents or another validation_share")
    print(f"  tokenizer: {counted(dataset.vocab_size, 'entry', 'entries')}, {dataset.eos_token} = {dataset.eos_id}")


if __name__ == "__main__":
    application("build_shards", ShardBuild, run, examples=EXAMPLES)
