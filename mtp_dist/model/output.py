"""The output head as a module: what turns the states of all depths into one loss.

It is a module, and not a call of ``head_loss`` from the chunk, so that whoever shards parameters (ZeRO-3) knows when its matrix
is needed.
"""

from torch import Tensor, nn

from mtp_dist.config.schema import ModelConfig
from mtp_dist.model.embedding import Embedding
from mtp_dist.model.head_loss import Teacher, head_loss
from mtp_dist.model.parameter import parameter
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.weight_gradients import WeightGradients


class OutputHead(nn.Module):
    """An output matrix of its own, for models that do not tie it to the embedding. Same shape and split as the embedding."""

    def __init__(self, model: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.weight = parameter((model.vocab_size, model.hidden), split=0, std=model.init_std, group=group)
        self.group = group

    def matrix(self) -> nn.Parameter:
        """[V/R, d]."""
        return self.weight

    def forward(
        self,
        states: list[Tensor],
        *,
        wanted: Tensor,
        scale: Tensor,
        queue: WeightGradients | None,
        main_only: bool = False,
        soft: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As ``head_loss``; soft: the first state and this head's matrix teach the depths."""
        matrix = self.matrix()
        teacher = Teacher(states[0], matrix) if soft else None
        return head_loss(states, matrix, wanted, scale, self.group, queue, main_only=main_only, teacher=teacher)


class TiedHead(OutputHead):
    """The embedding's matrix as output head. It owns no parameter."""

    def __init__(self, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.group = embedding.group
        self._embedding = (embedding,)  # in a tuple, or the parameter would get a second name

    @property
    def borrowed(self) -> tuple[nn.Parameter, ...]:
        """Parameters of other modules that this one reads."""
        return (self.matrix(),)

    def matrix(self) -> nn.Parameter:
        return self._embedding[0].weight
