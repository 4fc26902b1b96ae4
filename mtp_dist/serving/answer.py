"""What a client gets: the JSON shapes of OpenAI's completions and models. Pure."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mtp_dist.decoding.statistics import Statistics, total

REASONS = {"length": "length", "end_of_document": "stop", "stop_string": "stop"}
"""``Generated.ending`` -> finish_reason."""
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Completion:
    """One answer, whole or in events; all parts of it carry its id."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole answer, or one event of it."""
        content = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }
        return content if usage is None else {**content, "usage": usage}


def choice(index: int, text: str, ending: str) -> dict[str, Any]:
    """A text, or a piece of one; ``ending`` is empty for a text that goes on."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": REASONS[ending] if ending else None}


def usage(parts: Sequence[Statistics]) -> dict[str, Any]:
    """Tokens of all texts of a request; drafts are accepted or rejected predictions."""
    found = total(parts)
    accepted = sum(found.accepted)
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.tokens,
        "total_tokens": found.prompt_tokens + found.tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": found.nodes - accepted,
        },
    }


def models(name: str, created: int) -> dict[str, Any]:
    """``GET /v1/models``."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "mtp_dist"}]}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()
