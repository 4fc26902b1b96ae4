"""Runs one program in a process of its own that can neither write outside an empty folder nor reach the network, other
processes or files (``jail.py``), and that ends after some seconds.

A fence for a language model's mistakes, not a wall against an attacker of the kernel: where programs are hostile, use a
virtual machine.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mtp_dist.errors import UserError
from mtp_dist.programs import jail

GRACE = 1.0
"""Seconds to start the interpreter, on top of the program's own."""


@dataclass(frozen=True)
class Limits:
    """seconds: of wall time and of processor time. memory_mb: of address space, in MiB."""

    seconds: float = 5.0
    memory_mb: int = 512


def passes(program: str, limits: Limits) -> bool:
    """Whether the program ends by itself, without an error, within its limits. Raises UserError where the kernel has no such
    fence; nothing is run then."""
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="program-") as place, tempfile.TemporaryFile() as report:
        folder = Path(place)
        (folder / "inside").mkdir()
        path = folder / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        command = [_interpreter(), "-I", "-S", "-B", jail.__file__, str(path)]
        command += [str(max(1, round(limits.seconds))), str(limits.memory_mb << 20)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder / "inside",
            env={},
            start_new_session=True,
        )
        try:
            child.communicate(token, timeout=limits.seconds + GRACE)
        except subprocess.TimeoutExpired:
            pass
        except BrokenPipeError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        report.seek(0)
        said = report.read(200)
    if child.returncode == jail.REFUSED and said.startswith(b"refused"):
        raise UserError(
            f"programs.allow=true: this machine cannot fence programs in ({said.decode(errors='replace')}); needed is Linux 6.2 "
            "with Landlock and seccomp, on x86-64 or 64-bit Arm"
        )
    return child.returncode == 0 and said == token


def _interpreter() -> str:
    """The one that this environment was made from."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)
