"""``python -m mtp_dist.generate`` where a layout's processes share the model: ``parallel.pipeline=2 parallel.tensor=2``.

Started by hand it checks everything that needs no weights, writes the settings down, and starts torchrun on this machine. Under
torchrun, or as one of several tasks of srun, it is one process of the job: it takes ``settings=FROZEN_FILE``, or the settings
themselves, which rank 0 then checks for all. Prompts are dealt to the replicas; rank 0 prints.
"""

import contextlib
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_dist.checkpoint import folder
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config import versions
from mtp_dist.config.command import LastingOutput, open_output
from mtp_dist.config.compose import compose, load, save
from mtp_dist.config.schema import Generation
from mtp_dist.config.validation import validate_launch, validate_parallel
from mtp_dist.decoding import request
from mtp_dist.errors import AgreedError, UserError
from mtp_dist.exit_codes import BAD_INPUT
from mtp_dist.freezing import check_world
from mtp_dist.generate import (
    Writer,
    continue_prompts,
    draft_folder,
    encode_prompts,
    finish,
    load_draft_model,
    note_length,
    numbered,
    print_text,
)
from mtp_dist.launching import start_module
from mtp_dist.slurm_step import adopt

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.decoding.comparison import Continuation
    from mtp_dist.parallel.mesh import Mesh

MODULE = "mtp_dist.generate"


def prepare(config: Generation) -> Generation:
    """Check everything that needs no weights; returns the settings with the checkpoints that they mean. Raises UserError."""
    versions.check()
    request.validate(config)
    request.read_prompts(config)
    request.validate_layout(config)
    validate_launch(config.launch, config.parallel)
    checkpoint = folder.sound(config.checkpoint)
    trained = load_settings(checkpoint)
    decode = request.fitted(config.decode, trained.mtp)
    validate_parallel(config.parallel, trained.model, None)
    drafting = draft_folder(decode, checkpoint)
    if drafting is not None:
        decode = replace(decode, draft_model=str(drafting.resolve()))
    return replace(config, checkpoint=str(checkpoint.resolve()), decode=decode)


def start(config: Generation) -> int:
    """Start this machine's processes; returns the exit status."""
    ready = prepare(config)
    with tempfile.TemporaryDirectory(prefix="generate-") as place:
        path = Path(place) / "settings.yaml"
        save(ready, path)
        return start_module(ready, MODULE, [f"settings={path}"])


def main(argv: list[str]) -> int:
    """One process of the job; returns its exit status."""
    open_output()
    output = LastingOutput(sys.stdout)
    try:
        config, ready = settings(argv)
        with contextlib.redirect_stdout(output):
            work(config, ready=ready)
        return output.status()
    except UserError as error:
        if not isinstance(error, AgreedError) or os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return BAD_INPUT


def settings(argv: list[str]) -> tuple[Generation, bool]:
    """The settings of a process of the job, and whether they were checked before. Raises AgreedError."""
    frozen = len(argv) == 1 and argv[0].startswith("settings=")
    path = Path(argv[0].removeprefix("settings=")) if frozen else Path("the command line")
    try:
        config = load(path, Generation) if frozen else compose("generate", Generation, argv)
        check_world(config.parallel, path)
    except UserError as error:
        raise AgreedError(str(error)) from None  # every rank finds the same
    return config, frozen


def work(config: Generation, *, ready: bool) -> None:
    """Join the others and continue the prompts. ``ready``: the settings have been checked."""
    adopt(config.launch)
    import torch

    from mtp_dist.parallel.mesh import build_mesh, choose_device, connect, disconnect

    torch.set_num_threads(config.decode.threads or config.launch.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = choose_device(config.launch.device)
    connect(device, config.parallel.timeout_minutes)
    mesh = build_mesh(config.parallel, device)
    if not ready:
        config = prepared_together(config, mesh)
    prompts = request.read_prompts(config)
    checkpoint, writer = open_part(config, mesh)
    items = write(config, mesh, checkpoint, writer, prompts)
    if mesh.rank == 0:
        finish(config, checkpoint, items)
    disconnect()


def prepared_together(config: Generation, mesh: "Mesh") -> Generation:
    """``prepare`` by rank 0, which reads the files, for all. Collective. Raises AgreedError."""
    import torch.distributed as dist

    told: list[tuple[Generation | None, str]] = [(None, "")]
    if mesh.rank == 0:
        try:
            told = [(prepare(config), "")]
        except UserError as error:
            told = [(None, str(error))]
    dist.broadcast_object_list(told, 0, group=mesh.control)
    found, problem = told[0]
    if found is None:
        raise AgreedError(problem)
    return found


def open_part(config: Generation, mesh: "Mesh") -> "tuple[Checkpoint, Writer]":
    """This rank's part of the model, from prepared settings. Collective."""
    import torch

    from mtp_dist.checkpoint.reader import Checkpoint
    from mtp_dist.data.encoder import TextEncoder
    from mtp_dist.data.tokenizer import load_tokenizer
    from mtp_dist.decoding.draft_lengths import DraftLengths
    from mtp_dist.decoding.drafters import draft_length
    from mtp_dist.decoding.layout import ModelPart
    from mtp_dist.decoding.stopping import StopStrings

    decode, checkpoint = config.decode, Checkpoint(Path(config.checkpoint))
    dtype = getattr(torch, decode.dtype)
    part = ModelPart.of(checkpoint.load_part(config.parallel, mesh, dtype), mesh)
    drafting = None
    if decode.drafter == "model" and decode.mode != "plain" and part.leads:
        drafting = load_draft_model(Path(decode.draft_model), decode, dtype, mesh.device)
    most = draft_length(replace(decode, mode="speculative"), part.depth)
    lengths = DraftLengths(most) if decode.auto and decode.mode != "plain" else None
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    encoder = TextEncoder.of_run(checkpoint.tokenizer_path, checkpoint.config.tokenizer.eos_token)
    stops = StopStrings(tokenizer, decode.stop)
    return checkpoint, Writer(part, drafting, lengths, tokenizer, encoder, stops, decode, config.seed, mesh.rank > 0)


def write(
    config: Generation, mesh: "Mesh", checkpoint: "Checkpoint", writer: Writer, prompts: list[str]
) -> "list[Continuation]":
    """The continuations of all prompts, in order. One replica prints each text as it comes, of several rank 0 prints them all.
    Collective."""
    import torch.distributed as dist

    try:
        encoded = encode_prompts(writer.encoder, prompts)
    except UserError as error:  # every rank finds the same
        raise AgreedError(str(error)) from None
    replicas, speaks = config.parallel.data, mesh.rank == 0
    if speaks:
        note_length(encoded, config.decode, checkpoint.config.train.sequence_length)
    own = continue_prompts(
        config, writer, numbered(prompts, encoded)[mesh.data_rank :: replicas], show=speaks and replicas == 1
    )
    if replicas == 1:
        return own
    parts: list[list[Continuation] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own if mesh.is_reader else None, group=mesh.control)
    waiting = [iter(part) for part in parts if part is not None]  # in the order of the replicas
    items = [next(waiting[number % replicas]) for number in range(len(prompts))]
    for number, item in enumerate(items if speaks else []):
        print_text(config, writer, item, number, len(prompts))
    return items
