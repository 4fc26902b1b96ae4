"""Promise: initial values follow from seed and global name alone, so every layout starts from the same weights."""

import math
from dataclasses import replace

import pytest
import torch

from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import ParameterSpec, initial_value, initialize, spec_of
from mtp_dist.model.tensor_group import TensorGroup
from mtp_dist.model.trunk import Attention

MODEL = ModelConfig(vocab_size=96, layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, mlp=96, init_std=0.02)
MTP = MTPConfig(depth=1)


def built(group: TensorGroup, layers: range = range(8), *, first: bool = True, last: bool = True, seed: int = 7) -> Chunk:
    with torch.device("meta"):
        chunk = Chunk(MODEL, MTP, layers, first=first, last=last, group=group)
    initialize(chunk, seed)
    return chunk


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_slices_make_the_whole(split: int, size: int) -> None:
    shape = (8, 12)
    whole = initial_value("a.weight", ParameterSpec(shape, split, 0.02), 7)
    specs = [ParameterSpec(shape, split, 0.02, TensorGroup(rank, size)) for rank in range(size)]
    parts = [initial_value("a.weight", spec, 7) for spec in specs]
    assert torch.cat(parts, dim=split).equal(whole)
    for spec, part in zip(specs, parts, strict=True):
        assert part.shape == spec.local_shape
        assert spec.take(whole).equal(part)
        box = tuple(slice(a, a + n) for a, n in zip(spec.start, spec.local_shape, strict=True))
        assert whole[box].equal(part)
        assert part.is_contiguous()


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("rows", [8, 11, 97])
def test_uneven_shares_cover_each_row_once(size: int, rows: int) -> None:
    specs = [ParameterSpec((rows, 5), 0, 0.02, TensorGroup(rank, size)) for rank in range(size)]
    held = [row for spec in specs for row in range(spec.start[0], spec.start[0] + spec.local_shape[0])]
    assert held == list(range(rows))
    sizes = [spec.local_shape[0] for spec in specs]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert {spec.largest_share for spec in specs} == {max(sizes)} == {sizes[-1]}
    whole = initial_value("a.weight", ParameterSpec((rows, 5), 0, 0.02), 7)
    assert torch.cat([initial_value("a.weight", spec, 7) for spec in specs]).equal(whole)


@pytest.mark.parametrize(("size", "sharers"), [(2, 2), (4, 2), (8, 4)])
def test_neighbours_share_a_slice_and_one_of_them_counts(size: int, sharers: int) -> None:
    whole = initial_value("a.weight", ParameterSpec((8, 5), 0, 0.02), 7)
    specs = [ParameterSpec((8, 5), 0, 0.02, TensorGroup(rank, size), sharers=sharers) for rank in range(size)]
    parts = [initial_value("a.weight", spec, 7) for spec in specs]
    assert all(parts[rank].equal(parts[rank - rank % sharers]) for rank in range(size))
    assert [spec.counts_here for spec in specs] == [rank % sharers == 0 for rank in range(size)]
    assert torch.cat([part for spec, part in zip(specs, parts, strict=True) if spec.counts_here]).equal(whole)
    assert {spec.largest_share for spec in specs} == {8 * sharers // size}
    everywhere = [ParameterSpec((8, 5), None, 0.02, TensorGroup(rank, size)) for rank in range(size)]
    assert [spec.counts_here for spec in everywhere] == [rank == 0 for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_has_the_key_heads_of_its_queries(size: int) -> None:
    """Query head h uses key/value head h // (H / K)."""
    model = replace(MODEL, kv_heads=2)
    for rank in range(size):
        with torch.device("meta"):
            attention = Attention(model, TensorGroup(rank, size))
        queries, keys, values = (spec_of(part.weight) for part in (attention.query, attention.key, attention.value))
        used = {row // model.head_dim // 2 for row in range(queries.start[0], queries.start[0] + queries.local_shape[0])}  # type: ignore[operator]
        held = {row // model.head_dim for row in range(keys.start[0], keys.start[0] + keys.local_shape[0])}  # type: ignore[operator]
        assert held == used
        assert (values.start, values.local_shape) == (keys.start, keys.local_shape)


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_model_is_a_cut_of_the_whole_one(size: int) -> None:
    whole = dict(built(TensorGroup()).named_parameters())
    seen: dict[str, torch.Tensor] = {name: torch.zeros(p.shape) for name, p in whole.items()}
    for rank in range(size):
        parts = dict(built(TensorGroup(rank, size)).named_parameters())
        assert parts.keys() == whole.keys()
        for name, part in parts.items():
            spec = spec_of(part)
            assert spec.take(whole[name]).equal(part), name
            assert part.__dict__["tensor_model_parallel"] == (spec.split is not None), name
            box = tuple(slice(a, a + n) for a, n in zip(spec.start, spec.local_shape, strict=True))
            seen[name][box] += 1 if spec.split is not None else 1 / size
    assert all(count.eq(1).all() for count in seen.values()), "an element is held twice, or by no rank"


def test_chunks_hold_the_layers_of_the_whole_model() -> None:
    whole = dict(built(TensorGroup()).named_parameters())
    chunks = [built(TensorGroup(), range(3), last=False), built(TensorGroup(), range(3, 8), first=False)]
    held = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    assert held.keys() == whole.keys()
    assert all(held[name].equal(p) for name, p in whole.items())
    assert chunks[0].embedding is not None
    assert chunks[1].embedding is not None
    assert chunks[0].embedding.weight.equal(chunks[1].embedding.weight), "the replica of the embedding differs"


def test_names_and_seeds_draw_apart() -> None:
    parameters = {name: p for name, p in built(TensorGroup()).named_parameters() if p.ndim == 2}
    first = [round(p.flatten()[0].item() / spec_of(p).std, 6) for p in parameters.values()]  # type: ignore[operator]
    assert len(set(first)) == len(parameters)
    other = dict(built(TensorGroup(), seed=8).named_parameters())
    assert not any(other[name].equal(p) for name, p in parameters.items())
    again = dict(built(TensorGroup()).named_parameters())
    assert all(again[name].equal(p) for name, p in parameters.items())


def test_the_process_generator_is_not_touched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    built(TensorGroup())
    assert torch.get_rng_state().equal(before)


def test_deviations() -> None:
    """init_std everywhere, over sqrt(2 layers) where a block writes to the residual stream; norms are ones. The sample deviation
    of n values is within 5 / sqrt(2n) of the true one but once in a million draws."""
    for name, p in built(TensorGroup()).named_parameters():
        if "norm" in name:
            assert p.eq(1).all(), name
            continue
        residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        want = MODEL.init_std / (math.sqrt(2 * MODEL.layers) if residual else 1)
        assert p.std().item() == pytest.approx(want, rel=5 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * want / math.sqrt(p.numel()), name


def test_parts_that_exist_keep_their_storage() -> None:
    """Optimizers and shared modules hold references: initialising writes into what is there."""
    chunk = Chunk(MODEL, MTP, range(8))
    storages = [p.data_ptr() for p in chunk.parameters()]
    initialize(chunk, 7)
    assert [p.data_ptr() for p in chunk.parameters()] == storages
    assert all(p.equal(q) for p, q in zip(chunk.parameters(), built(TensorGroup()).parameters(), strict=True))
