"""What a kind of MTP head asks of the rest of the project, from the settings alone: no torch, so a plan can ask too."""

from mtp_dist.config.schema import ModelConfig, MTPConfig

KINDS = ("none", "sequential", "parallel", "medusa", "notebook", "eagle", "eagle3", "top")
CONTRACT = (
    "kind", "depth", "concat", "h0", "recycle", "repeat", "blocks", "branch", "projection", "embedding", "draft_vocabulary",
    "taps", "stride",
)  # fmt: skip
"""Settings that say which parameters the heads have and how a decoder must use them; every checkpoint records them."""


OWN_PROJECTION = ("medusa", "sequential", "notebook")
"""Kinds whose modules may have a vocabulary projection of their own."""
OWN_EMBEDDING = ("sequential", "notebook")
"""Kinds whose modules may have an embedding of their own."""
SAMPLED = ("sequential", "notebook")
"""Kinds that may be fed the model's own predictions in training."""


def contract(mtp: MTPConfig) -> dict[str, object]:
    """``CONTRACT`` by name."""
    return {name: getattr(mtp, name) for name in CONTRACT}


def one_module(mtp: MTPConfig) -> bool:
    """Whether the kind is one module for all depths by its definition."""
    return mtp.kind in ("eagle", "eagle3")


def order_window(mtp: MTPConfig) -> int:
    """Upcoming tokens that are ranked; 0: none are."""
    return mtp.window if mtp.kind == "top" else 0


def lookahead(mtp: MTPConfig) -> int:
    """Tokens of a row behind its S + 1: the targets of the depths, or the rest of the window that is ranked."""
    return max(mtp.depth * mtp.stride, order_window(mtp) - 1)


def modules(mtp: MTPConfig) -> int:
    """Modules with parameters of their own."""
    return min(mtp.depth, 1) if mtp.repeat or one_module(mtp) else mtp.depth


def reads_tokens(mtp: MTPConfig) -> bool:
    """Whether depth k is fed the embedding of the target of depth k-1."""
    return mtp.kind in ("sequential", "notebook", "eagle", "eagle3")


def soft_targets(mtp: MTPConfig) -> bool:
    """Whether the depths learn the trunk's distributions instead of tokens."""
    return mtp.kind != "none" and mtp.targets == "trunk"


def detaches(mtp: MTPConfig) -> bool:
    """Whether the MTP losses teach the MTP modules alone, though the trunk may learn from the main loss."""
    return mtp.detach or mtp.kind == "eagle"


def learns_inside(mtp: MTPConfig) -> bool:
    """Whether depth k learns from what the trunk itself makes of position i + k, which must then be in the row."""
    return soft_targets(mtp) or mtp.kind == "eagle"


def fused_states(model: ModelConfig, mtp: MTPConfig) -> tuple[int, ...]:
    """eagle3: the states that it joins, as ``taps`` counts them; the number of layers stands for the trunk's output before its
    final norm. Without `mtp.taps` those of the released code, or the ends of thirds of a trunk that is too small for them."""
    if mtp.taps:
        return tuple(mtp.taps)
    layers = model.layers
    return (2, layers // 2, layers - 3) if layers >= 7 else tuple(sorted({layers // 3, 2 * layers // 3, layers}))


def has_adversary(mtp: MTPConfig) -> bool:
    """Whether a discriminator learns beside the heads."""
    return mtp.kind != "none" and mtp.adversarial > 0


def owns_projections(mtp: MTPConfig) -> bool:
    """Whether each module has a vocabulary projection of its own."""
    return mtp.kind == "top" or (mtp.kind in OWN_PROJECTION and mtp.projection == "own")


def owns_embeddings(mtp: MTPConfig) -> bool:
    """Whether each module has an embedding of its own."""
    return mtp.kind in OWN_EMBEDDING and mtp.embedding == "own"


def predicts_tokens(mtp: MTPConfig) -> bool:
    """Whether the depths are, at some time of the run, fed the model's own predictions."""
    return any(p > 0 for p in (mtp.scheduled_sampling, *(later for _, later in mtp.scheduled_sampling_points)))


def taps(model: ModelConfig, mtp: MTPConfig) -> tuple[int, ...]:
    """States of the trunk that the heads read beside its output: layer i stands for the state that enters layer i. Ascending."""
    if mtp.kind == "eagle3":
        return tuple(layer for layer in fused_states(model, mtp) if layer < model.layers)
    return (model.layers - 1,) if mtp.kind == "parallel" and mtp.branch == "penultimate" else ()


def received_taps(model: ModelConfig, mtp: MTPConfig, layers: range) -> tuple[int, ...]:
    """Taps of earlier chunks, which reach the chunk of these layers together with the hidden state."""
    return tuple(tap for tap in taps(model, mtp) if tap < layers.start)


def handed_taps(model: ModelConfig, mtp: MTPConfig, layers: range, *, last: bool) -> tuple[int, ...]:
    """Taps that the chunk of these layers hands on together with the hidden state: those it received, and its own."""
    return () if last else tuple(tap for tap in taps(model, mtp) if tap < layers.stop)


def embeds_on_last(model: ModelConfig, mtp: MTPConfig) -> bool:
    """Whether the last chunk uses the trunk's embedding: as output head, or to feed the MTP modules."""
    return model.tie_embeddings or (reads_tokens(mtp) and not owns_embeddings(mtp))
