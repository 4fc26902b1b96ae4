"""Whether a completion passes its problem's tests, found out in two jailed processes (``jail.py``): one holds the program
(``candidate.py``), the other the tests (``examiner.py``), and only values pass between them (``channel.py``). The verdict is the
examiner's, which no code of the program ever runs in.

A fence for a language model's mistakes, and for tricks; not a wall against an attacker of the kernel: where programs are hostile,
use a virtual machine.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from mtp_dist.errors import UserError
from mtp_dist.programs import examiner, jail
from mtp_dist.programs.problems import Problem
from mtp_dist.programs.stubs import stub

START_SECONDS = 60.0
"""For both interpreters to start, before the program's own time begins."""
WATCH_SECONDS = 0.05
"""Between two looks at a folder that has no quota of its own."""
PACKAGES = str(Path(__file__).parents[2])
START = "import sys; sys.path.insert(0, sys.argv[1]); from mtp_dist.programs import {role}; del sys.path[0]; {role}.main()"


@dataclass(frozen=True)
class Limits:
    """seconds: of wall time, and of processor time for each process. memory_mb: of address space of each, in MiB."""

    seconds: float = 5.0
    memory_mb: int = 512


def passes(problem: Problem, completion: str, limits: Limits) -> bool:
    """Whether the problem's ``check`` returns for the function that prompt and completion define, within the limits. Raises
    UserError where the kernel has no such fence; nothing is run then."""
    return _run(problem, completion, limits)[0]


@cache
def missing_fences() -> tuple[str, ...]:
    """What this machine lacks of ``jail.py``, in words, found out with an empty program. Raises UserError as ``passes``."""
    nothing = Problem("", "", "def check(candidate): candidate()", "nothing")
    passed, missing = _run(nothing, "def nothing(): pass\n", Limits(seconds=30.0, memory_mb=512))
    if not passed:
        raise UserError("programs.allow=true: an empty program does not pass in this machine's sandbox; nothing was run")
    return missing


def _run(problem: Problem, completion: str, limits: Limits) -> tuple[bool, tuple[str, ...]]:
    head = stub(problem.prompt)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="program-")))
        # An unprivileged user goes through it, but cannot list it.
        place.chmod(0o711)
        # Each reads where the other writes.
        asked, asking = os.pipe()
        answered, answering = os.pipe()
        common = {"stub": head, "entry_point": problem.entry_point}
        try:
            tests = _Jailed("examiner", place, limits, answered, asking, {**common, "test": problem.test})
            stack.enter_context(tests.ended())
            program = {**common, "program": problem.prompt + completion}
            held = _Jailed("candidate", place, limits, asked, answering, program)
            stack.enter_context(held.ended())
        finally:
            for end in (asked, asking, answered, answering):
                os.close(end)
        both = [tests, held]
        _wait(both, time.monotonic() + START_SECONDS, lambda: all(one.said.count(b"\n") for one in both))
        missing = {fence for one in both for fence in one.fenced()}
        watched = both if jail.OWN_ROOT in missing else []
        _wait(both, time.monotonic() + limits.seconds, lambda: tests.over, watched)
        # A program may have filled its folder and ended between two looks.
        passed = tests.said.endswith(examiner.PASSED) and not any(one.full() for one in watched)
        return passed, tuple(sorted(missing))


class _Jailed:
    """One of the two processes, and what it reports."""

    def __init__(self, role: str, place: Path, limits: Limits, reading: int, writing: int, job: dict[str, Any]) -> None:
        self.folder = place / role
        self.folder.mkdir()
        readable = [sys.base_prefix, "/usr/lib", "/usr/share/zoneinfo", "/lib", "/lib64"]
        # Processor time only ends what nobody watches any more; starting takes some.
        given = {"folder": str(self.folder), "readable": readable, "seconds": ceil(limits.seconds) + 1}
        given |= {"memory": limits.memory_mb << 20, "reading": reading, "writing": writing}
        self.said, self.over = b"", False
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps({**given, **job}).encode())
            file.seek(0)
            self.process = subprocess.Popen(
                [_interpreter(), "-I", "-S", "-B", "-c", START.format(role=role), PACKAGES],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(reading, writing),
                cwd=self.folder,
                env={},
                start_new_session=True,
            )

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Gone on leaving, with everything that it started."""
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def fenced(self) -> list[str]:
        """Which fences are missing. Raises UserError where there are none."""
        line, _, _ = self.said.partition(b"\n")
        try:
            report = json.loads(line)
        except ValueError:
            raise UserError(f"programs.allow=true: {_interpreter()} did not start in a sandbox; nothing was run") from None
        if "refused" in report:
            raise UserError(
                f"programs.allow=true: this machine cannot fence programs in ({report['refused']}); it needs Linux with seccomp, "
                "and with mount namespaces or Landlock (6.2), on x86-64 or 64-bit Arm"
            )
        return [str(fence) for fence in report["fenced"]]

    def full(self) -> bool:
        """Whether its folder is over the quota; it is flat."""
        try:
            with os.scandir(self.folder) as entries:
                sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
        except OSError:
            return False
        return len(sizes) > jail.FOLDER_FILES or sum(sizes) > jail.FOLDER_BYTES


def _wait(both: Sequence[_Jailed], deadline: float, done: Any, watched: Sequence[_Jailed] = ()) -> None:
    """Read their reports until ``done``, the deadline, or a full folder."""
    with selectors.DefaultSelector() as selector:
        for one in both:
            if not one.over:
                assert one.process.stdout is not None
                selector.register(one.process.stdout, selectors.EVENT_READ, one)
        while not done() and selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, WATCH_SECONDS) if watched else left):
                part = os.read(key.fd, 4096)
                key.data.said = (key.data.said + part)[-65536:]
                if not part:
                    key.data.over = True
                    selector.unregister(key.fileobj)
            if any(one.full() for one in watched):
                return


def _interpreter() -> str:
    """The one that this environment was made from."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)
