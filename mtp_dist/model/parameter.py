"""What every parameter knows of itself: its global shape, its slice under tensor parallelism, and how it is initialised.

Initial values are drawn by (seed, global name), so that any layout starts from the same weights.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtp_dist.model.tensor_group import ALONE, TensorGroup


@dataclass(frozen=True)
class ParameterSpec:
    """`shape`: of the whole parameter; `split`: the dimension that `group` divides, None if each rank holds all of it;
    `std`: standard deviation of the initial normal draw, None for ones; `copy_of`: name of the parameter of the same shape whose
    initial value it shares, whatever draws or reads that; `stands_for`: name of the one whose value it takes where a run starts
    from a checkpoint that lacks it.

    Rank r of R holds r n/R .. (r+1) n/R - 1, rounded down, of a dimension of n >= R: shares of a vocabulary may differ by one.
    """

    shape: tuple[int, ...]
    split: int | None
    std: float | None
    group: TensorGroup = ALONE
    copy_of: str | None = None
    stands_for: str | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(end - begin for begin, end in self._ranges())

    @property
    def start(self) -> tuple[int, ...]:
        """Where this rank's slice begins in each dimension."""
        return tuple(begin for begin, _ in self._ranges())

    @property
    def largest_share(self) -> int:
        """Most that any rank holds of the split dimension."""
        return 0 if self.split is None else -(-self.shape[self.split] // self.group.size)

    def _ranges(self) -> list[tuple[int, int]]:
        rank, size = self.group.rank, self.group.size
        return [(rank * n // size, (rank + 1) * n // size) if dim == self.split else (0, n) for dim, n in enumerate(self.shape)]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's slice of the whole parameter."""
        if self.split is None:
            return whole
        return whole.narrow(self.split, self.start[self.split], self.local_shape[self.split])


def parameter(
    shape: tuple[int, ...],
    *,
    split: int | None,
    std: float | None,
    group: TensorGroup,
    copy_of: str | None = None,
    stands_for: str | None = None,
) -> nn.Parameter:
    """An uninitialised parameter that holds this rank's slice; its ``spec`` describes it.

    ``tensor_model_parallel`` is DeepSpeed's own mark: unmarked parameters are taken for replicas and counted once in the gradient
    norm.
    """
    spec = ParameterSpec(shape, split, std, group, copy_of, stands_for)
    result = nn.Parameter(torch.empty(spec.local_shape))
    result.spec = spec  # type: ignore[attr-defined]
    result.tensor_model_parallel = split is not None and group.size > 1  # type: ignore[attr-defined]
    return result


def spec_of(p: Tensor) -> ParameterSpec:
    """What ``parameter`` recorded."""
    spec: ParameterSpec = p.spec  # type: ignore[attr-defined]
    return spec


def initial_value(name: str, spec: ParameterSpec, seed: int) -> Tensor:
    """float32 values of this rank's slice, the same for every layout."""
    if spec.std is None:
        return torch.ones(spec.local_shape)
    digest = hashlib.sha256(f"{seed}/{spec.copy_of or name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return spec.take(torch.randn(spec.shape, generator=generator) * spec.std).contiguous()


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Materialise every parameter of a module built on the meta device (or not) with its initial value."""
    for name, p in module.named_parameters():
        value = initial_value(name, spec_of(p), seed)
        if p.is_meta:
            replace(module, name, value)
        else:
            p.copy_(value)


def replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a meta parameter storage, keeping its attributes."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(owner, leaf, new)
