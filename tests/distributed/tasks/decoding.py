"""A model that the ranks of a layout decode together."""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mtp_dist.checkpoint.reader import Checkpoint
from mtp_dist.config.schema import DecodeConfig, Generation, LaunchConfig, ParallelConfig
from mtp_dist.decoding.engine import NewText, generate_batch
from mtp_dist.decoding.layout import ModelPart
from mtp_dist.decoding.request import read_prompts
from mtp_dist.parallel.mesh import build_mesh


def decode(
    checkpoint: str, parallel: dict[str, Any], cases: list[dict[str, Any]], prompts: list[list[int]], vocabulary: int
) -> dict[str, Any]:
    """tokens: of each case, a text for each prompt that it names, and how its drafts fared; held: parameters that this rank has,
    with their shapes."""
    opened = Checkpoint(Path(checkpoint))
    layout = ParallelConfig(**parallel)
    mesh = build_mesh(layout, torch.device("cpu"))
    part = ModelPart.of(opened.load_part(layout, mesh, torch.float32), mesh)
    found = [run(part, case, prompts, vocabulary) for case in cases]
    held = {name: tuple(p.shape) for chunk in part.chunks for name, p in chunk.named_parameters()}
    return {"texts": found, "held": held}


def run(model: Any, case: dict[str, Any], prompts: list[list[int]], vocabulary: int) -> list[tuple[Any, ...]]:
    """(tokens, why it ended, drafts made, drafts accepted) of each text. A case: rows (side_by_side of them at a time, if it says
    so), draft_model, and settings of decoding."""
    settings = dict(case)
    rows, other, side_by_side = settings.pop("rows"), settings.pop("draft_model", None), settings.pop("side_by_side", None)
    config = DecodeConfig(**settings)
    new = [NewText(prompts[row], config.max_new_tokens, generator=torch.Generator().manual_seed(100 + row)) for row in rows]
    texts = generate_batch(
        model,
        new,
        config,
        rows=side_by_side,
        end=8,
        vocabulary=vocabulary,
        draft_model=None if other is None else Checkpoint(Path(other)).load_model(),
    )
    return [(text.tokens, text.ending, text.statistics.drafted, text.statistics.accepted) for text in texts]


def continued(settings: dict[str, Any]) -> dict[str, Any]:
    """The command's work on this rank: what it printed, and the tokens of its continuations; or the error that it raised."""
    from mtp_dist.errors import UserError
    from mtp_dist.generation_job import open_part, prepared_together, write

    config = replace(Generation(**settings), launch=LaunchConfig(device="cpu"))
    config.parallel, config.decode = ParallelConfig(**settings["parallel"]), DecodeConfig(**settings["decode"])
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    with redirect_stdout(io.StringIO()) as printed:
        try:
            ready = prepared_together(config, mesh)
        except UserError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        items = write(ready, mesh, *open_part(ready, mesh), read_prompts(ready))
    modes = {mode: [item.results[mode].tokens for item in items] for mode in items[0].results}
    return {"printed": printed.getvalue(), "texts": modes}
