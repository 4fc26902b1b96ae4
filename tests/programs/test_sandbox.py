"""Promise: a program passes if and only if it ends by itself without an error; what it may not do it cannot do. Each
forbidden program is also run without the fence, where it succeeds: else its failure would show nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.programs.sandbox import Limits, passes

LIMITS = Limits(seconds=3.0, memory_mb=256)
FORBIDDEN = {
    "memory": "x = bytes(10**9)",
    "write beside its folder": "open('../beside', 'w')",
    "write by an absolute path": "open('{outside}/beside', 'w')",
    "write through a link": "import os; os.symlink('{outside}', 'link'); open('link/beside', 'w')",
    "write from another folder": "import os; os.chdir('{outside}'); open('beside', 'w')",
    "a large file": "file = open('large', 'wb', 0)\nfor _ in range(3): assert file.write(bytes(10**6)) == 10**6",
    "read": "open('{outside}/secret').read()",
    "list": "import os; os.listdir('{outside}')",
    "change a mode": "import os; os.chmod('{outside}/secret', 0o777)",
    "remove": "import os; os.remove('{outside}/removable')",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "thread": "import threading; thread = threading.Thread(target=print); thread.start(); thread.join()",
    "another program": "import subprocess; subprocess.run(['true'], check=True)",
    "become another program": "import os; os.execv('/bin/true', ['true'])",
    "socket": "import socket; socket.socket()",
    "pair of sockets": "import socket; socket.socketpair()",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, resource.RLIM_INFINITY))",
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "removable").write_text("still here")
    (tmp_path / "inside").mkdir()
    return tmp_path


def test_right_programs_pass() -> None:
    modules = "math, random, re, json, itertools, collections, heapq, datetime, hashlib"
    assert passes(f"import {modules}\nassert math.gcd(4, 6) == 2", LIMITS)
    assert passes("open('own', 'w').write('text')\nassert open('own').read() == 'text'\nprint('x' * 10**7)", LIMITS)


@pytest.mark.parametrize(
    "program",
    ["assert 1 == 2", "1 +", "raise SystemExit(0)", "import os; os._exit(0)", "import sys; sys.exit()"],
)
def test_wrong_programs_fail(program: str) -> None:
    assert not passes(program, LIMITS)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "def f(): f()\nwhile True:\n try: f()\n except RecursionError: pass",
    ],
)
def test_endless_programs_are_ended(program: str) -> None:
    assert not passes(program, Limits(seconds=1.0, memory_mb=256))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_programs_are_fenced_in(what: str, outside: Path) -> None:
    program = FORBIDDEN[what].replace("{outside}", str(outside))
    assert not passes(program, LIMITS)
    assert sorted(path.name for path in outside.iterdir()) == ["inside", "removable", "secret"]
    free = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=outside / "inside", capture_output=True, timeout=60)
    assert free.returncode == 0, free.stderr


def test_nothing_stays_behind() -> None:
    before = set(Path("/tmp").glob("program-*"))
    assert passes("open('file', 'w').write('x')", LIMITS)
    assert set(Path("/tmp").glob("program-*")) <= before
