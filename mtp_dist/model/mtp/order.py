"""Token order prediction (Zuhri, Fuadi and Aji, arXiv 2508.19228): one more output matrix on the trunk's last state that ranks
the upcoming tokens by how soon they come. An auxiliary loss: it drafts nothing, and only training needs it.

The paper scores a token that first comes back d tokens behind the next one with W - d, W the window, and minimises ListNet's
-sum_v softmax(score)_v log softmax(logits)_v. So the softmax of the scores is e^-d over the tokens of the window, each at its
first occurrence, and nothing elsewhere: W targets a position with known shares (``model/targets.py: upcoming``) say the same as
a row of the whole vocabulary, which is never made. A token 17 places on has a share of e^-17, less than float32 resolves beside
the first: a window of 16 stands for the paper's, which is the whole row.

Choices of this project: tokens of other documents are not in the window; a position counts where two upcoming tokens of its
document are there, since one has no order. Right is the position whose first place is the next token's.
"""

from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.attention import Mask
from mtp_dist.model.mtp.heads import Feed, Heads, TrunkStates
from mtp_dist.model.output import OwnProjection
from mtp_dist.model.tensor_group import TensorGroup


class OrderModule(nn.Module):
    """The matrix, which the loss calls."""

    def __init__(self, model: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        self.head = OwnProjection(model, group)


class OrderHeads(Heads):
    """One matrix on h⁰, as a depth of its own."""

    def __init__(self, model: ModelConfig, mtp: MTPConfig, group: TensorGroup) -> None:
        super().__init__({"1": OrderModule(model, group)}, mtp.depth)

    def forward(self, trunk: TrunkStates, feed: Feed, turn: Tensor, mask: Mask) -> list[Tensor]:
        return [trunk.after_norm]
