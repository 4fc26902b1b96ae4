"""Other modules in the place of a model's own, where decoding can do the same faster."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


def replace(model: nn.Module, kind: type[T], by: Callable[[T], nn.Module]) -> None:
    """Put ``by(module)`` in the place of every module of a kind below ``model``, one after the other, so that little memory is
    needed beside it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, by(child))
