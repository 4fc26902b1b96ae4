"""A model behind HTTP: ``python -m mtp_dist.serve checkpoint=runs/quickstart``.

OpenAI's completions, so that tools that know them can try a checkpoint; ``docs/serving.md`` says what is served and how it ends.
"""

import importlib.util
import ipaddress
import sys
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from mtp_dist.checkpoint import folder
from mtp_dist.config import versions
from mtp_dist.config.command import application
from mtp_dist.config.compose import require_numbers
from mtp_dist.config.rules import given
from mtp_dist.config.schema import Serving
from mtp_dist.decoding import request
from mtp_dist.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load: wrong settings are answered before
    from mtp_dist.generate import Writer
    from mtp_dist.serving.request import Served
    from mtp_dist.serving.worker import Worker

LIBRARIES = ("starlette", "uvicorn")


def validate(config: Serving) -> None:
    """Raise UserError at the first setting that no checkpoint could be served with."""
    given("checkpoint", config.checkpoint, "RUN_FOLDER")
    given("host", config.host, "127.0.0.1")
    require_numbers(config)
    request.validate_decoding(config.decode)
    if config.decode.mode == "both":
        raise UserError("decode.mode=both compares, and a server gives one text; choose plain or speculative")
    if config.decode.temperature > 2:
        raise UserError(f"decode.temperature={config.decode.temperature} must be from 0 to 2, as in requests")
    _check_libraries()
    from mtp_dist.serving import access

    for key, texts, wrong in (("hosts", config.hosts, access.wrong_host), ("origins", config.origins, access.wrong_origin)):
        for text in texts:
            if why := wrong(text):
                raise UserError(f"{key}={text} {why}")


def _check_libraries() -> None:
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"{library} is not installed, which serving needs; install the extra 'serve': bash launch/install.sh serve, or "
                "pip install 'mtp_dist[serve]'"
            )


def run(config: Serving) -> int:
    """The command; it ends on a signal."""
    versions.check()
    validate(config)
    folder.locate(config.checkpoint)
    if not _loopback(config.host):
        print(f"note: host={config.host}: whoever reaches this address can use the model; there is no password", file=sys.stderr)

    from mtp_dist.serving.access import Access, names
    from mtp_dist.serving.connection import Times
    from mtp_dist.serving.server import Server, address, allow_descriptors, bound, serve

    allow_descriptors(config.connections)
    with bound(config.host, config.port) as listening:
        from mtp_dist.generate import load_writer
        from mtp_dist.serving.application import Service
        from mtp_dist.serving.application import application as http

        checkpoint, writer = load_writer(config.checkpoint, config.decode, seed=0)
        served = _served(config, checkpoint.path, checkpoint.config.train.sequence_length, writer)
        worker = _worker(writer, config.waiting, served.longest)
        access = Access(names([config.host, *config.hosts]), names(config.origins))
        body = config.body_kib * 1024
        service = Service(served, writer.tokenizer, writer.encoder, worker, config.seconds, body, config.body_seconds, access)
        times = Times(config.header_seconds, config.idle_seconds, config.write_seconds)
        ready = f"serving {served.name} (step {checkpoint.step}, {config.decode.dtype}) at {address(listening)}/v1"
        server = Server(http(service), worker, config.patience, config.connections, times, lambda: print(ready, flush=True))
        serve(server, listening)
    return 0


def _served(config: Serving, path: Path, trained: int, writer: "Writer") -> "Served":
    from mtp_dist.data.tokenizer import vocabulary_size
    from mtp_dist.serving.request import Served

    decode, longest = config.decode, trained if config.longest is None else config.longest
    if longest > trained:
        print(f"note: texts may reach {longest} tokens; the model was trained on rows of {trained}", file=sys.stderr)
    run_folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return Served(
        name=config.name or run_folder.name,
        vocabulary=vocabulary_size(writer.tokenizer),
        longest=longest,
        texts=config.waiting,
        max_tokens=min(decode.max_new_tokens, longest),
        temperature=decode.temperature,
        top_k=decode.top_k,
        top_p=decode.top_p,
        stop=tuple(decode.stop),
    )


def _worker(writer: "Writer", waiting: int, longest: int) -> "Worker":
    """Started, and the first text written: threads and kernels start there, and a model that cannot decode fails there."""
    from mtp_dist.decoding.engine import grow
    from mtp_dist.decoding.stopping import StopStrings
    from mtp_dist.generate import WARM_UP_TOKENS
    from mtp_dist.serving.worker import FAILED, Piece, Text, Worker

    decoder = partial(grow, writer.model, longest=longest, lengths=writer.lengths, **writer.told)
    worker = Worker(decoder, writer.decode, waiting, writer.model.device)
    worker.start()
    ended, endings = Event(), []

    def heard(piece: Piece) -> None:
        if piece.ending:
            endings.append(piece.ending)
            ended.set()

    nothing, decode = StopStrings(writer.tokenizer, []), writer.decode
    text = Text(0, [0], min(WARM_UP_TOKENS, longest - 1), decode.temperature, decode.top_k, decode.top_p, nothing, 0, heard)
    worker.submit([text])
    ended.wait()
    if endings == [FAILED]:
        raise RuntimeError("the model cannot decode; the reason is above")
    return worker


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    application(
        "serve",
        Serving,
        run,
        examples=[
            "python -m mtp_dist.serve checkpoint=runs/quickstart",
            "python -m mtp_dist.serve checkpoint=runs/quickstart port=0 decode.dtype=bfloat16 decode.auto=true",
            "python -m mtp_dist.serve checkpoint=runs/quickstart decode.drafter=ngram decode.batch=16 longest=512",
        ],
        epilog="curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' "
        "-d '{\"prompt\": \"def main(\", \"max_tokens\": 32}'",
    )
