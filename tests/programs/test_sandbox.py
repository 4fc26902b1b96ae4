"""Promise: a completion passes if and only if the tests accept the values of its function; whatever else it does cannot make it
pass. What it may not do it cannot do: each forbidden program is also run without the fence, where it succeeds: else its failure
would show nothing."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.errors import UserError
from mtp_dist.programs import jail
from mtp_dist.programs.problems import Problem
from mtp_dist.programs.sandbox import Limits, missing_fences, passes

LIMITS = Limits(seconds=10.0, memory_mb=256)
HEAD = 'def answer(x=None):\n    """One."""\n'
ONE = Problem("own/one", HEAD, "def check(candidate):\n    assert candidate() == 1\n", "answer")


def completes(program: str, limits: Limits = LIMITS) -> bool:
    """Whether a program runs to its end when the function is called."""
    return passes(ONE, f"{indented(program)}    return 1\n", limits)


def indented(program: str) -> str:
    return "".join(f"    {line}\n" for line in program.splitlines())


FORBIDDEN = {
    "memory": "x = bytes(10**9)",
    "write beside its folder": "open('../beside', 'w')",
    "write by an absolute path": "open('{outside}/beside', 'w')",
    "write through a link": "import os; os.symlink('{outside}', 'link'); open('link/beside', 'w')",
    "write from another folder": "import os; os.chdir('{outside}'); open('beside', 'w')",
    "a folder": "import os; os.mkdir('deep')",
    "read": "open('{outside}/secret').read()",
    "list": "import os; os.listdir('{outside}')",
    "read what every machine has": "open('/etc/passwd').read()",
    "processes": "open('/proc/self/status').read()",
    "change a mode": "import os; os.chmod('{outside}/secret', 0o777)",
    "remove": "import os; os.remove('{outside}/removable')",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "thread": "import threading; thread = threading.Thread(target=print); thread.start(); thread.join()",
    "another program": "import subprocess; subprocess.run(['true'], check=True)",
    "become another program": "import os; os.execv('/bin/true', ['true'])",
    "socket": "import socket; socket.socket()",
    "pair of sockets": "import socket; socket.socketpair()",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "signals by descriptor": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())",
    "a session of its own": "import os; os.setsid()",
    "a file in memory": "import os; os.memfd_create('x')",
    "trace itself": "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "keys": "import ctypes; assert ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",
}
QUOTAS = {
    "a large file": "file = open('large', 'wb', 0)\nfor _ in range(3): assert file.write(bytes(10**6)) == 10**6",
    "many large files": "for n in range(40): open(f'large{n}', 'wb').write(bytes(10**6))",
    "many files": "for n in range(1000): open(f'small{n}', 'wb').close()",
}
ROOTS = {
    "rename the host": "import socket; socket.sethostname(socket.gethostname())",
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/', None, 4096 | 32, None) == 0",
    "another user's file": "import os; os.chown('{outside}/secret', 1, 1)",
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "removable").write_text("still here")
    (tmp_path / "inside").mkdir()
    return tmp_path


def test_right_programs_pass() -> None:
    modules = "math, random, re, json, itertools, collections, heapq, datetime, hashlib, typing, functools, string, fractions"
    assert completes(f"import {modules}\nassert math.gcd(4, 6) == 2")
    assert completes("open('own', 'w').write('text')\nassert open('own').read() == 'text'\nprint('x' * 10**7)")


@pytest.mark.parametrize(
    "program", ["assert 1 == 2", "1 +", "raise SystemExit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"]
)
def test_wrong_programs_fail(program: str) -> None:
    assert not completes(program)
    assert not passes(ONE, f"    return 1\n{program}\n", LIMITS)


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(1000)", "while True:\n try: answer()\n except RecursionError: pass"]
)
def test_endless_programs_are_ended(program: str) -> None:
    assert not completes(program, Limits(seconds=1.0, memory_mb=256))


def test_endless_tests_are_ended() -> None:
    endless = Problem("own/endless", HEAD, "def check(candidate):\n    while candidate() == 1: pass\n", "answer")
    assert not passes(endless, "    return 1\n", Limits(seconds=1.0, memory_mb=256))


def test_programs_are_fenced_in(outside: Path) -> None:
    """Each in turn in one process; all fail, and none for want of what an earlier one used up."""
    programs = {what: program.replace("{outside}", str(outside)) for what, program in FORBIDDEN.items()}
    failures = "(OSError, MemoryError, RuntimeError, AssertionError)"
    every = "".join(
        f"    try:\n{indented(indented(program))}        done.append({what!r})\n    except {failures}: pass\n"
        for what, program in programs.items()
    )
    test = "def check(candidate):\n    assert candidate() == ['own']\n"
    own = "    open('own', 'w').write('x')\n    done.append('own')\n    return done\n"
    assert passes(Problem("own/all", HEAD, test, "answer"), f"    done = []\n{every}{own}", LIMITS)
    assert sorted(path.name for path in outside.iterdir()) == ["inside", "removable", "secret"]


@pytest.mark.parametrize("what", QUOTAS)
def test_a_folder_has_a_quota(what: str) -> None:
    assert not completes(QUOTAS[what])


@pytest.mark.parametrize("what", [*FORBIDDEN, *QUOTAS])
def test_without_fences_the_same_programs_do_it(what: str, outside: Path) -> None:
    program = {**FORBIDDEN, **QUOTAS}[what].replace("{outside}", str(outside))
    free = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=outside / "inside", capture_output=True, timeout=60)
    assert free.returncode == 0, free.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="what only root may do")
@pytest.mark.parametrize("what", ROOTS)
def test_roots_rights_do_not_reach_inside(what: str, outside: Path) -> None:
    program = ROOTS[what].replace("{outside}", str(outside))
    assert not completes(program)
    alone = ["unshare", "--mount", "--uts"] if what in ("rename the host", "mount") else []
    free = subprocess.run([*alone, sys.executable, "-I", "-S", "-c", program], capture_output=True, timeout=60)
    assert free.returncode == 0, free.stderr


def test_a_program_is_nobody_and_alone() -> None:
    """Where nothing is missing: no root, the only process, an empty root folder, a host's name that is not ours."""
    if missing_fences():
        pytest.skip(f"this machine lacks {missing_fences()}")
    assert completes(
        "import os\nassert os.getuid() != 0 and os.getpid() == 1 and os.listdir('.') == []\n"
        "assert os.uname().nodename == 'program' and not os.path.exists('/etc') and not os.path.exists('/proc')"
    )


FORGERIES = {
    "every frame's values, written everywhere": (
        "import os, sys\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "        for end in range(64):\n"
        "            try: os.write(end, value if isinstance(value, bytes) else str(value).encode())\n"
        "            except OSError: pass\n"
        "    frame = frame.f_back\n"
    ),
    "the verdict's own words": (
        "import os\n"
        "for end in range(64):\n"
        "    for text in (b'passed\\n', b'{\"fenced\": []}\\npassed\\n'):\n"
        "        try: os.write(end, text)\n"
        "        except OSError: pass\n"
        "os._exit(0)\n"
    ),
    "another end": "import os\nos._exit(0)\n",
    "the tests' function, wherever it may be": (
        "import gc, sys, builtins\n"
        "for thing in gc.get_objects():\n"
        "    if isinstance(thing, dict) and 'check' in thing: thing['check'] = lambda candidate: None\n"
        "for module in list(sys.modules.values()): module.check = lambda candidate: None\n"
        "builtins.AssertionError = type('Quiet', (BaseException,), {})\n"
    ),
    "a value that equals all": (
        "class Equal(int):\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 1\n"
        "return Equal(7)\n"
    ),
    "an object that equals all": "class Equal:\n    def __eq__(self, other): return True\nreturn Equal()\n",
    "replies that are no values": (
        "import json, os, struct\n"
        "for end in range(3, 64):\n"
        "    reply = {'what': 'reply', 'raised': [], 'nodes': [['foreign', 'yours', 0]], 'roots': [0]}\n"
        "    for message in (reply, [], {'what': 'call'}):\n"
        "        raw = json.dumps(message).encode()\n"
        "        try: os.write(end, struct.pack('>I', len(raw)) + raw)\n"
        "        except OSError: pass\n"
    ),
    "a test's exception": "raise AssertionError\n",
    "no exception at all": "class Quiet(BaseException): pass\nraise Quiet\n",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_no_program_can_forge_a_pass(what: str) -> None:
    body = indented(FORGERIES[what])
    assert not passes(ONE, f"{body}    return 0\n", LIMITS)
    careless = Problem("own/bare", HEAD, "def check(candidate):\n    try: candidate()\n    except: pass\n", "answer")
    if "_exit" in body or "replies" in what:
        assert not passes(careless, f"{body}    return 0\n", LIMITS)


def test_nothing_stays_behind() -> None:
    before = set(Path("/tmp").glob("program-*"))
    assert completes("open('file', 'w').write('x')")
    assert set(Path("/tmp").glob("program-*")) <= before


def without(*calls: int) -> list[str]:
    """A command under which these system calls fail, as in a container or with an older kernel."""
    steps = [(0x20, 0, 0, 0), *((0x15, len(calls) - place, 0, call) for place, call in enumerate(calls))]
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 1)]
    raw = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = (
        "import ctypes, os, struct, sys\n"
        f"raw = ctypes.create_string_buffer({raw!r})\n"
        f"filters = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', {len(steps)}, ctypes.addressof(raw)))\n"
        "libc = ctypes.CDLL(None)\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filters, 0, 0) == 0\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    return [sys.executable, "-c", code]


UNSHARE, MOUNT, LANDLOCK, SECCOMP = (272, 165, 444, 157) if os.uname().machine == "x86_64" else (97, 40, 444, 167)
HERE = """
from mtp_dist.errors import UserError
from tests.programs.test_sandbox import FORBIDDEN, QUOTAS, completes, missing_fences
try:
    print(*missing_fences(), sep="; ")
except UserError as error:
    print(error)
else:
    print(completes("open('own', 'w').write('x')"))
    print([what for what in ("many files", "read what every machine has", "fork", "write by an absolute path")
           if completes({**FORBIDDEN, **QUOTAS}[what].replace("{outside}", "/tmp"))])
"""


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ((LANDLOCK,), ["Landlock", "True", r"\[\]"]),
        ((MOUNT,), [rf".*{re.escape(jail.OWN_ROOT)}.*", "True", r"\[\]"]),
        ((UNSHARE,), [r".*namespaces of their own \(.*process, mount\)", "True", r"\[\]"]),
        ((UNSHARE, LANDLOCK), [r"programs\.allow=true: this machine cannot fence programs in \(neither mounts nor Landlock .*"]),
    ],
)
def test_what_is_missing_is_said(calls: tuple[int, ...], says: list[str]) -> None:
    """Fewer fences hold what they are for; where files would be open, nothing runs."""
    done = subprocess.run([*without(*calls), "-c", HERE], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(says) and all(map(re.fullmatch, says, lines)), done


def test_a_machine_without_seccomp_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_dist.programs.sandbox.START", 'import os; os.write(1, b\'{{"refused": "why"}}\\n\')#{role}')
    with pytest.raises(UserError, match=r"cannot fence programs in \(why\)"):
        passes(ONE, "    return 1\n", LIMITS)
