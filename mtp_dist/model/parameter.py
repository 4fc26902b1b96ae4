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
    initial value it shares, whatever draws or reads that; `sharers`: how many neighbours in `group` hold the same slice, a
    divisor of its size (key/value heads where there are more ranks than heads); `stands_for`: name of the one whose value it
    takes where a run starts from a checkpoint that lacks it.

    Slice s of S = R / sharers is s n/S .. (s+1) n/S - 1, rounded down, of a dimension of n >= S: shares of a vocabulary may
    differ by one. Rank r of R holds slice r / sharers, rounded down.
    """

    shape: tuple[int, ...]
    split: int | None
    std: float | None
    group: TensorGroup = ALONE
    copy_of: str | None = None
    sharers: int = 1
    stands_for: str | None = None

    @property
    def counts_here(self) -> bool:
        """Whether this rank stands for those that hold the same slice: what is counted or saved once, is so by it."""
        return self.group.rank % (self.group.size if self.split is None else self.sharers) == 0

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
        return 0 if self.split is None else -(-self.shape[self.split] // (self.group.size // self.sharers))

    def _ranges(self) -> list[tuple[int, int]]:
        own, slices = self.group.rank // self.sharers, self.group.size // self.sharers
        return [(own * n // slices, (own + 1) * n // slices) if dim == self.split else (0, n) for dim, n in enumerate(self.shape)]

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
    sharers: int = 1,
    stands_for: str | None = None,
) -> nn.Parameter:
    """An uninitialised parameter that holds this rank's slice; its ``spec`` describes it.

    ``tensor_model_parallel`` is DeepSpeed's own mark: the gradient norm counts a marked parameter on every tensor rank, any other
    on the first one only. So of the ranks that share a slice one is marked.
    """
    spec = ParameterSpec(shape, split, std, group, copy_of, sharers, stands_for)
    result = nn.Parameter(torch.empty(spec.local_shape))
    result.spec = spec  # type: ignore[attr-defined]
    result.tensor_model_parallel = split is not None and group.size > 1 and spec.counts_here  # type: ignore[attr-defined]
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
