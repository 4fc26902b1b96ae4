"""The process that runs a problem's tests: it holds the problem and its tests, and asks another process for values of the
function.

It is jailed like the other, since tests come from a file too, and a test may loop. It reports ``passed`` exactly if ``check`` has
returned and every answer was well formed.
"""

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from mtp_dist.programs import jail
from mtp_dist.programs.channel import Peer
from mtp_dist.programs.stubs import stub_classes

PASSED = b"passed\n"


def main() -> None:
    """Started by ``sandbox.py``."""
    job, report = jail.begin()
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["tests"]
    namespace, name = vars(module), job["entry_point"]
    # The problem's own helpers and classes, which tests may use, and a function without a body.
    exec(compile(job["stub"], "problem", "exec"), namespace)
    names = stub_classes(job["stub"], name)
    classes = {found: namespace[found] for found in names if isinstance(namespace.get(found), type)}
    peer = Peer(job["reading"], job["writing"], namespace, classes, open=False)
    if peer.receive() != {"what": "ready"}:
        return
    namespace[name] = _candidate(peer, namespace.get(name))
    exec(compile(job["test"], "test", "exec"), namespace)
    namespace["check"](namespace[name])
    if not peer.broken:
        os.write(report, PASSED)


def _candidate(peer: Peer, stub: Any) -> Callable[..., Any]:
    """The other side's function, under the name and with the signature of the problem's."""

    def candidate(*arguments: Any, **named: Any) -> Any:
        return peer.ask("call", 0, arguments, named)

    return functools.wraps(stub)(candidate) if callable(stub) else candidate
