"""The family of Multi-Token Prediction heads behind one interface.

A kind of head turns the trunk's output into the hidden state of each depth; projection, loss, layout and decoding are shared, so
that only the state transition differs from kind to kind. Every kind is a module with

    forward(trunk: TrunkStates, feed: Feed, turn, mask) -> D states [B, S, d]

where `feed` gives what depth k reads: Emb(t[i+k]), or the embedding of a prediction of it. Each state is what the shared output
head reads, unless the kind's `ready` says otherwise; `imitated` names the trunk's states that they are to equal, where a kind has
such a loss. What a kind asks of the rest (modules, tokens, taps) is in ``config/heads.py``.
"""

from collections.abc import Callable

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.mtp.eagle import EagleHeads
from mtp_dist.model.mtp.eagle3 import Eagle3Heads
from mtp_dist.model.mtp.heads import Heads
from mtp_dist.model.mtp.medusa import MedusaHeads
from mtp_dist.model.mtp.notebook import NotebookHeads
from mtp_dist.model.mtp.order import OrderHeads
from mtp_dist.model.mtp.parallel import ParallelHeads
from mtp_dist.model.mtp.sequential import SequentialHeads
from mtp_dist.model.tensor_group import TensorGroup


def build_heads(model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> Heads | None:
    """The heads that `mtp.kind` names, None for none."""
    kinds: dict[str, Callable[[ModelConfig, MTPConfig, TensorGroup], Heads]] = {
        "sequential": SequentialHeads,
        "parallel": ParallelHeads,
        "medusa": MedusaHeads,
        "notebook": NotebookHeads,
        "eagle": EagleHeads,
        "eagle3": Eagle3Heads,
        "top": OrderHeads,
    }
    return kinds[mtp.kind](model, mtp, group) if mtp.kind != "none" else None
