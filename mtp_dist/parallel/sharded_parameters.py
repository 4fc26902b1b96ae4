"""ZeRO-3's parameters: sharded over replicas by DeepSpeed, gathered module by module while a forward or backward pass needs them.

A parameter is a flat vector, cut into equal shards of ceil(elements / replicas); the last ones may be short or empty, and are
padded. Between passes a parameter's own tensor is empty and its shape is that of ``spec_of(p).local_shape``.
"""

import math

import torch
from torch import Tensor, nn

from mtp_dist.model.parameter import initial_value, replace, spec_of
from mtp_dist.parallel.mesh import Mesh, import_deepspeed


def shard_range(p: nn.Parameter, mesh: Mesh) -> tuple[int, int]:
    """First and last + 1 of the flattened elements of this rank's slice that this replica's shard holds."""
    elements = math.prod(spec_of(p).local_shape)
    size = -(-elements // mesh.parallel.data)
    return min(mesh.data_rank * size, elements), min((mesh.data_rank + 1) * size, elements)


def initialize_sharded(chunk: nn.Module, seed: int, mesh: Mesh, dtype: torch.dtype) -> None:
    """Give every parameter of a chunk on the meta device its initial value and shard it at once: no rank ever holds more whole
    parameters than one module's own. Collective over replicas."""
    deepspeed = import_deepspeed()
    with torch.no_grad():
        for path, module in chunk.named_modules():
            own = [name for name, _ in module.named_parameters(recurse=False)]
            for leaf in own:
                name = f"{path}.{leaf}"
                value = initial_value(name, spec_of(getattr(module, leaf)), seed)
                replace(module, leaf, value.to(mesh.device, dtype))
            if own:
                deepspeed.zero.Init(module=module, data_parallel_group=mesh.replicas, mem_efficient_linear=False, dtype=dtype)


def announce_borrowed(chunk: nn.Module) -> None:
    """Tell DeepSpeed which modules use parameters that are not their own: it gathers them for those modules, too."""
    for module in chunk.modules():
        for p in getattr(module, "borrowed", ()):
            import_deepspeed().zero.register_external_parameter(module, p)


def write_shard(p: nn.Parameter, value: Tensor, mesh: Mesh) -> None:
    """Overwrite the weight by this rank's whole slice of it: its shard, and the copy of a parameter that stays gathered."""
    begin, end = shard_range(p, mesh)
    p.ds_tensor.data[: end - begin].copy_(value.flatten()[begin:end])  # type: ignore[attr-defined]
    if p.numel():
        p.data.copy_(value.view_as(p))


def gathered(p: nn.Parameter) -> Tensor:
    """A copy of this rank's whole slice. Collective over replicas."""
    with import_deepspeed().zero.GatheredParameters([p]):
        return p.detach().clone()
