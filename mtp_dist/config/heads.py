"""What a kind of MTP head asks of the rest of the project, from the settings alone: no torch, so a plan can ask too."""

from mtp_dist.config.schema import ModelConfig, MTPConfig

KINDS = ("none", "sequential", "parallel", "medusa", "notebook")
CONTRACT = ("kind", "depth", "concat", "h0", "recycle", "repeat", "blocks", "branch", "projection")
"""Settings that say which parameters the heads have and how a decoder must use them; every checkpoint records them."""


def contract(mtp: MTPConfig) -> dict[str, object]:
    """``CONTRACT`` by name."""
    return {name: getattr(mtp, name) for name in CONTRACT}


def modules(mtp: MTPConfig) -> int:
    """Modules with parameters of their own."""
    return min(mtp.depth, 1) if mtp.repeat else mtp.depth


def reads_tokens(mtp: MTPConfig) -> bool:
    """Whether depth k is fed the embedding of t[i+k]: the last chunk then needs the embedding."""
    return mtp.kind in ("sequential", "notebook")


def soft_targets(mtp: MTPConfig) -> bool:
    """Whether the depths learn the trunk's distributions instead of tokens."""
    return mtp.kind != "none" and mtp.targets == "trunk"


def learns_inside(mtp: MTPConfig) -> bool:
    """Whether depth k learns from what the trunk itself makes of position i + k, which must then be in the row."""
    return soft_targets(mtp)


def owns_projections(mtp: MTPConfig) -> bool:
    """Whether each depth has a vocabulary projection of its own."""
    return mtp.kind == "medusa" and mtp.projection == "own"


def taps(model: ModelConfig, mtp: MTPConfig) -> tuple[int, ...]:
    """States of the trunk that the heads read beside its output: layer i stands for the state that enters layer i. Ascending."""
    return (model.layers - 1,) if mtp.kind == "parallel" and mtp.branch == "penultimate" else ()


def received_taps(model: ModelConfig, mtp: MTPConfig, layers: range) -> tuple[int, ...]:
    """Taps of earlier chunks, which reach the chunk of these layers together with the hidden state."""
    return tuple(tap for tap in taps(model, mtp) if tap < layers.start)


def handed_taps(model: ModelConfig, mtp: MTPConfig, layers: range, *, last: bool) -> tuple[int, ...]:
    """Taps that the chunk of these layers hands on together with the hidden state: those it received, and its own."""
    return () if last else tuple(tap for tap in taps(model, mtp) if tap < layers.stop)


def embeds_on_last(model: ModelConfig, mtp: MTPConfig) -> bool:
    """Whether the last chunk uses the embedding: as output head, or to feed the MTP modules."""
    return model.tie_embeddings or reads_tokens(mtp)
