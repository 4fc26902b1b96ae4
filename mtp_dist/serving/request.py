"""What a client asks: the JSON of ``POST /v1/completions``, read and checked field by field. Pure, and no torch here.

Names and meaning are those of OpenAI's completions. A field that is not served is an error unless it says nothing (null, or the
value that stands for "none"), so that no request is answered as if it had asked for something else.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_dist.config.bounds import TEMPERATURE, TOP_P
from mtp_dist.config.numbers import Bounds, fault, json_whole
from mtp_dist.config.numbers import shown as shown_number
from mtp_dist.quantity import counted

MOST_STOPS = 16
LONGEST_STOP = 256
"""In characters: what a text's end is compared with after each token."""
LARGEST_SEED = 2**63 - 1
SILENT: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""Fields that are not served, and the values that ask for nothing."""
READ = ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "stream", "stream_options", "echo")
UNUSED = ("user",)


class RequestError(Exception):
    """An answer that is no completion: an HTTP status, one line for a person, the field that is at fault, a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """What requests are held against: the model's name and vocabulary, the limits, and the values of fields that are not given.

    longest: tokens of a prompt and its continuation. texts: of one request.
    """

    name: str
    vocabulary: int
    longest: int
    texts: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A request that can be served. prompts: tokens of each text; limits: tokens that each may get. seed: None for chance."""

    prompts: list[list[int]]
    limits: list[int]
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    usage_event: bool
    echo: bool


def read(body: bytes, served: Served, encode: Callable[[str], list[int]]) -> Asked:
    """The request of a body. Raises RequestError at the first field that is wrong."""
    content = _content(body)
    for name, nothing in SILENT.items():
        if (value := content.get(name)) is not None and (isinstance(value, bool) or value not in nothing):
            allowed = " or ".join(["null", *(json.dumps(item) for item in nothing)])
            raise wrong(name, value, f"is not served here; leave it out, or give {allowed}")
    for name in content:
        if name not in READ and name not in SILENT and name not in UNUSED:
            raise RequestError(400, f"unknown field {_shown(name)}; a request takes {', '.join(READ)}", _shown(name))
    if (model := _text(content, "model", served.name)) != served.name:
        raise RequestError(404, f"model={_shown(model)} is not served here; there is {served.name}", "model", "model_not_found")
    prompts = _prompts(content.get("prompt"), served, encode)
    stream = _flag(content, "stream")
    options = content.get("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        raise wrong("stream_options", options, "must be an object, and needs stream=true")
    return Asked(
        prompts=prompts,
        limits=_limits(content, prompts, served),
        temperature=_number(content, "temperature", served.temperature, replace(TEMPERATURE, most=2)),
        top_k=_integer(content, "top_k", served.top_k, 0, served.vocabulary),
        top_p=_number(content, "top_p", served.top_p, TOP_P),
        stop=_stops(content.get("stop"), served),
        seed=None if content.get("seed") is None else _integer(content, "seed", 0, 0, LARGEST_SEED),
        stream=stream,
        usage_event=_flag(options or {}, "include_usage"),
        echo=_flag(content, "echo"),
    )


def wrong(name: str, value: object, rule: str) -> RequestError:
    """The field, its value, what is allowed."""
    return RequestError(400, f"{name}={_shown(value)} {rule}", name)


def _content(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_int=json_whole)
    except UnicodeDecodeError:
        raise RequestError(400, "the body is not UTF-8 text; send a JSON object") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deep; send a flat JSON object") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({' '.join(str(error).split())}); send an object with a prompt") from None
    if not isinstance(content, dict):
        raise RequestError(400, f"the body is {_shown(content)}; send a JSON object with a prompt")
    return content


def _prompts(value: object, served: Served, encode: Callable[[str], list[int]]) -> list[list[int]]:
    if value is None:
        raise RequestError(400, "prompt is missing; give a string, a list of strings, or tokens as numbers", "prompt")
    single = isinstance(value, str) or (isinstance(value, list) and all(_is_integer(item) for item in value) and value)
    items = [value] if single else value
    if not isinstance(items, list) or not items:
        raise wrong("prompt", value, "must be a string, a list of strings, a list of tokens, or a list of such lists")
    if len(items) > served.texts:
        message = f"prompt holds {counted(len(items), 'text')}; this server takes at most {served.texts} in a request"
        raise RequestError(400, message, "prompt")
    return [_tokens("prompt" if single else f"prompt[{place}]", item, served, encode) for place, item in enumerate(items)]


def _tokens(name: str, value: object, served: Served, encode: Callable[[str], list[int]]) -> list[int]:
    if isinstance(value, str):
        tokens = encode(_encodable(name, value))
    elif isinstance(value, list) and all(_is_integer(item) for item in value):
        for token in value:
            if not 0 <= token < served.vocabulary:
                message = f"{name} holds the token {_shown(token)}; tokens are from 0 to {served.vocabulary - 1}"
                raise RequestError(400, message, "prompt")
        tokens = value
    else:
        raise RequestError(400, f"{name}={_shown(value)} must be a string or a list of tokens", "prompt")
    if not tokens:
        raise RequestError(400, f"{name} is empty; give one character or token at least", "prompt")
    return tokens


def _limits(content: Mapping[str, Any], prompts: list[list[int]], served: Served) -> list[int]:
    """Tokens that each text may get: as many as asked, or by default as many as there is room for."""
    asked, longest = content.get("max_tokens"), max(map(len, prompts))
    most = _integer(content, "max_tokens", served.max_tokens, 1, served.longest)
    least = 1 if asked is None else most
    if longest + least > served.longest:
        raise RequestError(
            400,
            f"prompt has {counted(longest, 'token')} and max_tokens={least} may follow, {longest + least} in all; this server "
            f"takes at most {served.longest}",
            "prompt",
            "context_length_exceeded",
        )
    return [min(most, served.longest - len(prompt)) for prompt in prompts]


def _stops(value: object, served: Served) -> tuple[str, ...]:
    if value is None:
        return served.stop
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise wrong("stop", value, f"must be a string, or a list of at most {MOST_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= LONGEST_STOP:
            raise wrong("stop", stop, f"must be a string of 1 to {LONGEST_STOP} characters")
        _encodable("stop", stop)
    return tuple(stops)


def _encodable(name: str, text: str) -> str:
    """JSON may hold halves of characters that no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RequestError(400, f"{name} has half a character ({half}) at place {error.start}; send whole ones", name) from None
    return text


def _number(content: Mapping[str, Any], name: str, default: float, bounds: Bounds) -> float:
    value = content.get(name)
    if value is None:
        return default
    if (rule := fault(value, bounds, whole=False)) is not None:
        raise wrong(name, value, rule)
    return float(value)


def _integer(content: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = content.get(name)
    if value is None:
        return default
    if (rule := fault(value, Bounds(least, most), whole=True)) is not None:
        raise wrong(name, value, rule)
    return int(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "must be true or false")
    return bool(value)


def _text(content: Mapping[str, Any], name: str, default: str) -> str:
    value = content.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, value, "must be a string")
    return default if value is None else value


def _shown(value: object) -> str:
    """A value as JSON, which is ASCII, cut where it is long."""
    if _is_integer(value):
        return shown_number(value)
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
