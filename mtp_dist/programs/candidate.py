"""The jailed process that holds a program: problem and completion, of which it lets the function be called.

It is told nothing of the tests, and nothing that it says is believed but the values that its function returns.
"""

import os
import sys
import types

from mtp_dist.programs import jail
from mtp_dist.programs.channel import Peer
from mtp_dist.programs.stubs import stub_classes


def main() -> None:
    """Started by ``sandbox.py``."""
    job, report = jail.begin()
    os.close(report)
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program"]
    namespace = vars(module)
    exec(compile(job["program"], "program", "exec"), namespace)
    names = stub_classes(job["stub"], job["entry_point"])
    classes = {name: namespace[name] for name in names if isinstance(namespace.get(name), type)}
    peer = Peer(job["reading"], job["writing"], namespace, classes, open=True)
    peer.exported.append(namespace[job["entry_point"]])
    peer.send({"what": "ready"})
    peer.serve()
