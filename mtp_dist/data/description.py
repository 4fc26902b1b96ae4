"""A dataset in words, and what is wrong with its files. For ``python -m mtp_dist.inspect FOLDER``."""

from pathlib import Path

from mtp_dist.data.dataset import Dataset
from mtp_dist.errors import UserError
from mtp_dist.member_file import member_sha256
from mtp_dist.quantity import counted

DOCUMENTS = 1024
"""Read together."""


def describe(path: Path) -> str:
    """What dataset.json says, a line a subject. Raises UserError where it is damaged, or contradicts its files."""
    dataset = Dataset.open(path)
    manifest = dataset.manifest
    rows = [
        ("dataset", str(path)),
        ("format", manifest.format),
        ("tokenizer", f"{dataset.vocab_size} tokens, {dataset.eos_token!r} ({dataset.eos_id}) ends a document"),
        ("stored as", manifest.dtype),
    ]
    for name, split in dataset.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        counts = ", ".join(
            counted(number, noun, commas=True)
            for number, noun in ((split.documents, "document"), (split.tokens, "token"), (len(split.shards), "shard"))
        )
        rows.append((name, f"{counts}, {size:,} bytes"))
        rows.append(("", f"fingerprint {split.fingerprint}"))
    rows.append(("built from", ", ".join(f"{key} {value}" for key, value in manifest.settings.items())))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def damages(path: Path) -> list[str]:
    """What is wrong with its shards: their SHA-256, their indexes, and each document's checksum and tokens. Reads all of them
    twice. Raises UserError as ``describe``."""
    from mtp_dist.data.reading import load_index, read_range  # loads torch, which a look at dataset.json does not need

    found = []
    for split in Dataset.open(path).splits.values():
        for shard in split.shards:
            try:
                if member_sha256(shard.folder, shard.record.file)[1] != shard.sha256:
                    found.append(f"{shard.record.file}: its SHA-256 is not the recorded one")
                    continue
                index = load_index(shard)
                for start in range(0, shard.documents, DOCUMENTS):
                    read_range(shard, index, start, min(start + DOCUMENTS, shard.documents))
            except UserError as error:
                found.append(str(error))
            except OSError as error:
                found.append(f"{shard.record.file}: {error.strerror}")
    return found
