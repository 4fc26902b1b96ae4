"""Runs one program that nobody has read, in a process that gives up its rights first. Started by ``sandbox.py`` as a script,
with nothing but the standard library.

python -I -S -B jail.py PROGRAM SECONDS MEMORY_BYTES with a token on the standard input

What is given up, for good: memory, processor time, file size and open files beyond limits (setrlimit); every file but the
interpreter's own, read only, and the working folder (Landlock, Linux 6.2); new processes and threads, other programs,
sockets, signals and tracing (seccomp). If the program then ends by itself, without an error and without having asked to exit,
the token is written to the standard output as it was at the start.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
OPEN_FILES = 32
FILE_BYTES = 1 << 20
REFUSED = 3
"""Exit status where the kernel cannot do this; nothing was run."""

# linux/landlock.h: rights over files as of version 3 of the interface, which are forbidden where no rule allows them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF, LEAST = 444, 445, 446, 3
READ = 1 << 2 | 1 << 3  # files, folders
FILES = (1 << 15) - 1

# asm/unistd.h and linux/audit.h: clone and friends, execve, sockets, signals, tracing, namespaces and mounts; keys, io_uring,
# limits, shared memory; and what Landlock lets pass, modes, owners, attributes and times of files.
FORBIDDEN = {
    "x86_64": (
        0xC000003E,
        (
            56, 57, 58, 435, 59, 322, 41, 53, 62, 200, 234, 129, 297, 424, 434, 101, 310, 311, 272, 308, 165, 428,
            429, 430, 432, 442, 248, 249, 250, 298, 321, 323, 425, 426, 427, 302, 160, 246, 169, 161, 155, 133, 259,
            29, 64, 68, 240, 90, 91, 92, 93, 94, 260, 268, 452, 188, 189, 190, 197, 198, 199, 132, 235, 261, 280, 463,
            466,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            220, 435, 221, 281, 198, 199, 129, 130, 131, 138, 240, 424, 434, 117, 270, 271, 97, 268, 40, 428, 429,
            430, 432, 442, 217, 218, 219, 241, 280, 282, 425, 426, 427, 261, 164, 104, 142, 51, 41, 33, 194, 190, 186,
            180, 52, 53, 54, 55, 452, 5, 6, 7, 14, 15, 16, 88, 463, 466,
        ),
    ),
}
X32 = 0x40000000
EPERM = 1


def limit(seconds: int, memory: int) -> None:
    """Of this process alone. Processor time ends it even if the parent does not."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def close_files(readable: list[str], writable: str) -> None:
    """Only these folders can be read, only the last one written. Raises OSError where the kernel has no Landlock."""
    version = _call(CREATE_RULESET, None, 0, 1)
    if version < LEAST:
        raise OSError(f"version {version} of Landlock does not keep files from being emptied")
    attributes = struct.pack("Q", FILES)
    ruleset = _call(CREATE_RULESET, attributes, len(attributes), 0)
    for path, rights in [*((path, READ) for path in readable), (writable, FILES & ~1)]:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        _call(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, folder), 0)
        os.close(folder)
    _prctl(PR_SET_NO_NEW_PRIVS, 1, 0)
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def close_kernel() -> None:
    """System calls that start, reach or change anything outside fail with EPERM from now on."""
    architecture, numbers = FORBIDDEN[platform.machine()]
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM
    count = len(numbers)
    # Classic BPF: (code, jump if true, jump if false, value) on struct seccomp_data {nr, arch, ..}.
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, kill), (0x20, 0, 0, 0), (0x35, count + 1, 0, X32)]
    program += [(0x15, count - place, 0, number) for place, number in enumerate(numbers)]
    program += [(0x06, 0, 0, allow), (0x06, 0, 0, refuse)]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    # struct sock_fprog: a length, padding, a pointer.
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(raw)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters)


def _call(number: int, *arguments: object) -> int:
    done = int(LIBC.syscall(number, *arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return done


def _prctl(option: int, value: int, more: object) -> None:
    if LIBC.prctl(option, value, more, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def main() -> None:
    path, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    token = sys.stdin.buffer.read()
    with open(path, encoding="utf-8") as file:
        source = file.read()
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        limit(seconds, memory)
        close_files([sys.base_prefix, "/usr/lib", "/usr/share/zoneinfo", "/lib", "/lib64"], os.getcwd())
        close_kernel()
    except (OSError, KeyError) as error:
        os.write(report, f"refused: {error}".encode())
        os._exit(REFUSED)
    sys.argv = ["program"]
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    os.write(report, token)
    os._exit(0)


if __name__ == "__main__":
    main()
