"""Promise: the bytes and the micro-batches in flight that ``mtp_dist.plan`` names for a rank are those that it holds."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mtp_dist.config.heads import modules, owns_embeddings, owns_projections
from mtp_dist.config.layout import is_v, micro_batches
from mtp_dist.config.schema import TrainingRun
from mtp_dist.parallel.budget import CHECKPOINT_BYTES, MASTER_BYTES, chunk_parameters, chunks_in_flight, rank_memory
from mtp_dist.plan import global_ranks
from tests.distributed.layouts import ESSENTIAL, LAYOUTS, configuration

# ZeRO pads each of four parameter groups of float32 master, moments and gradient to a multiple of a few elements a replica.
PADDING = 4 * 4 * 4 * 64


def layouts(names: Iterable[str]) -> list[Any]:
    """Parameters of a test."""
    return [name if name in ESSENTIAL else pytest.param(name, marks=pytest.mark.full) for name in names]


# A frozen trunk has no schedule.
IN_V = [name for name in LAYOUTS if is_v(configuration(name).parallel) and not configuration(name).mtp.freeze_trunk]


@pytest.fixture(scope="session")
def held(grid: Callable[[str], list[Any]]) -> Callable[[str], list[Any]]:
    return lambda layout: [result["held"] for result in grid(layout)]


def vocabulary_matrices(config: TrainingRun) -> int:
    """Matrices that are split by the vocabulary."""
    own = modules(config.mtp) * (owns_projections(config.mtp) + owns_embeddings(config.mtp))
    return 1 + (not config.model.tie_embeddings) + own


@pytest.mark.parametrize("layout", layouts(LAYOUTS))
def test_bytes_of_a_rank(held: Any, layout: str) -> None:
    config = configuration(layout)
    for found in held(layout):
        planned = rank_memory(config, found["pipeline_rank"])
        tensor = config.parallel.tensor
        if (config.model.vocab_size or 0) % tensor and found["rank"] % tensor != tensor - 1:
            # The last tensor rank is the one with most rows of the vocabulary, where it holds any: one row more of each matrix.
            assert 0 <= planned.weights - found["weights"] <= 4 * config.model.hidden * vocabulary_matrices(config)
            continue
        assert found["rank"] in global_ranks(config.parallel, found["pipeline_rank"])
        assert planned.weights == pytest.approx(found["weights"], abs=PADDING if config.zero.stage == 3 else 0)
        assert planned.gradients == pytest.approx(found["gradients"], abs=PADDING if config.zero.stage >= 2 else 0)
        assert planned.optimizer + planned.host == pytest.approx(found["optimizer"], abs=PADDING)


@pytest.mark.parametrize("layout", layouts(LAYOUTS))
def test_bytes_of_a_background_save(held: Any, layout: str) -> None:
    config = configuration(layout)
    for found in held(layout):
        assert found["snapshot"] <= rank_memory(config, found["pipeline_rank"]).snapshot + PADDING
    whole = chunk_parameters(config.model, config.mtp, config.model.layers)
    trained = whole.heads if config.mtp.freeze_trunk else whole.total
    saved = CHECKPOINT_BYTES * trained + MASTER_BYTES * (whole.total - trained)
    assert sum(found["snapshot"] for found in held(layout)) == saved


@pytest.mark.parametrize("layout", layouts(IN_V))
def test_passes_in_flight(held: Any, layout: str) -> None:
    config = configuration(layout)
    for found in held(layout):
        assert found["in_flight"] == chunks_in_flight(config.parallel, found["pipeline_rank"], micro_batches(config))
