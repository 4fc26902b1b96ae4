"""A process that gives up its rights before it runs what nobody has read. Standard library only: it runs in a bare interpreter.

From outside in, each as far as the machine has it; ``enter`` returns what is missing:

1. Namespaces (mounts, processes, network, IPC, host name, clocks, cgroups), with a user namespace where the caller is not root.
2. A root of its own: the interpreter's folders, read only, and an empty folder in memory with a quota of bytes and files.
3. Landlock (Linux 6.2): the same folders, by a second mechanism.
4. Limits on memory, processor time, file size and open files (setrlimit).
5. An unprivileged user without capabilities.
6. seccomp: the system calls of ``system_calls.ALLOWED``, and no others.

Nothing runs without the last one, or without one of 2 and 3.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

from mtp_dist.programs import system_calls

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
OPEN_FILES = 32
FILE_BYTES = 1 << 20
LARGEST = (1 << 63) - 1
FOLDER_BYTES = 16 << 20
FOLDER_FILES = 256
"""The folder's quota. Where it cannot be mounted with one, ``sandbox.py`` watches it."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 4, 38, 22, 2
# linux/sched.h. The process namespace comes last: it is for children alone.
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
NAMESPACES = {
    "network": 0x40000000,
    "IPC": 0x08000000,
    "host name": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
    "process": 0x20000000,
}
NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NO_SUID_NO_DEVICES = 442, -100, 0x8000, 1 | 2 | 4
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# linux/landlock.h: rights over files, connections, signals and abstract sockets, which are forbidden where no rule allows them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF, LEAST = 444, 445, 446, 3
READ = 1 << 2 | 1 << 3  # files, folders
WRITE = READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # also: write, remove, make and truncate regular files

OWN_ROOT = "a root of their own with a quota (their folder is watched instead)"
LANDLOCK = "Landlock"
USER = "an unprivileged user"


def enter(folder: str, readable: list[str], seconds: int, memory: int) -> list[str]:
    """Give up rights for good, and return in a child of the calling process, in an empty folder; the caller itself waits for that
    child and ends as it ends.

    folder: an empty one of the caller's, where this process is, to work in or to mount on. readable: folders that stay readable.
    memory: bytes of address space. Returns the fences that this machine lacks, in words. Raises OSError where what remains would
    be no fence.
    """
    missing: list[str] = []
    mounts = _namespaces(missing, readable)
    own_root = mounts and _own_root(folder, readable)
    if not own_root:
        missing.append(OWN_ROOT)
    _continue_in_child()
    _limit(seconds, memory)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    try:
        _landlock(readable)
    except OSError as error:
        if not own_root:
            raise OSError(error.errno, f"neither mounts nor Landlock can close files ({error.strerror})") from None
        missing.append(LANDLOCK)
    if not _unprivileged(readable):
        missing.append(USER)
    # After the change of user, which clears it.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_DUMPABLE, 0)
    _seccomp()
    return missing


def _namespaces(missing: list[str], readable: list[str]) -> bool:
    """Leave the shared ones; whether mounts can be changed now."""
    mounts = _unshared(NEW_MOUNTS)
    if not mounts:
        # Not root, or root in a container without rights: a user namespace gives them over what is new.
        if os.geteuid() == 0 and _readable_to_nobody(readable):
            _become_nobody()
            # Else /proc/self belongs to root.
            _prctl(PR_SET_DUMPABLE, 1)
        user, group = os.geteuid(), os.getegid()
        mounts = _unshared(NEW_USER) and _mapped(user, group) and _unshared(NEW_MOUNTS)
    shared = [name for name, flag in NAMESPACES.items() if not _unshared(flag)]
    if not mounts:
        shared.append("mount")
    if shared:
        missing.append(f"namespaces of their own ({', '.join(shared)})")
    if "host name" not in shared:
        LIBC.sethostname(b"program", 7)
    return mounts


def _unshared(flag: int) -> bool:
    return LIBC.unshare(flag) == 0


def _mapped(user: int, group: int) -> bool:
    """The one user and the one group of a new user namespace, who keep their numbers."""
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def _own_root(folder: str, readable: list[str]) -> bool:
    """Make ``folder`` the root, with ``readable`` in it, and go to an empty folder in memory."""
    try:
        _mount(None, "/", None, RECURSIVE | PRIVATE)
        _mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,nr_inodes=1k,mode=755")
    except OSError:
        return False
    try:
        for path in readable:
            target = folder + path
            if not os.path.isdir(path) or os.path.exists(target):
                continue
            os.makedirs(target)
            _mount(path, target, None, BIND | RECURSIVE)
            _read_only(target)
        os.mkdir(f"{folder}/program")
        quota = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700"
        _mount("tmpfs", f"{folder}/program", "tmpfs", NO_SUID | NO_DEVICES, quota)
        os.chdir(folder)
        _call(PIVOT_ROOT[platform.machine()], b".", b".")
    except (OSError, KeyError):
        LIBC.umount2(folder.encode(), DETACH)
        os.chdir(folder)
        return False
    # The old root lies over the new one now.
    if LIBC.umount2(b".", DETACH):
        raise OSError(ctypes.get_errno(), "the old root cannot be unmounted")
    _read_only("/", recursive=False)
    os.chdir("/program")
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word if word is None else word.encode() for word in (source, target, kind, options)]
    if LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        raise OSError(ctypes.get_errno(), f"{target} cannot be mounted")


def _read_only(path: str, recursive: bool = True) -> None:
    attributes = struct.pack("QQQQ", READ_ONLY_NO_SUID_NO_DEVICES, 0, 0, 0)
    _call(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE if recursive else 0, attributes, len(attributes))


def _continue_in_child() -> None:
    """The first process of the new process namespace. What stays behind holds nothing open, so that whoever reads from the child
    notices its end."""
    child = os.fork()
    if child == 0:
        return
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _limit(seconds: int, memory: int) -> None:
    """Of this process alone. Processor time ends it even if nobody watches."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = min(most, LARGEST if hard == resource.RLIM_INFINITY else hard)
        resource.setrlimit(kind, (least, least))


def _landlock(readable: list[str]) -> None:
    """Only these folders can be read, only the working folder written. Raises OSError where the kernel has no Landlock."""
    version = _call(CREATE_RULESET, None, 0, 1)
    if version < LEAST:
        raise OSError(0, f"version {version} of Landlock does not keep files from being emptied")
    # struct landlock_ruleset_attr: files, connections (version 4), abstract sockets and signals (version 6).
    files = (1 << 16) - 1 if version >= 5 else (1 << 15) - 1
    attributes = struct.pack("QQQ", files, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _call(CREATE_RULESET, attributes, len(attributes), 0)
    for path, rights in [*((path, READ) for path in readable), (".", WRITE)]:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        _call(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, folder), 0)
        os.close(folder)
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _unprivileged(readable: list[str]) -> bool:
    """No capabilities; and not root, if the interpreter's files can be read by others."""
    dropped = os.geteuid() != 0 or _readable_to_nobody(readable)
    if os.geteuid() == 0 and dropped:
        _become_nobody()
    # linux/capability.h: version 3, this process; effective, permitted and inheritable, twice 32 bits each.
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if LIBC.capset(header, none):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")
    return dropped


def _readable_to_nobody(readable: list[str]) -> bool:
    """Tried out as that user, which a user namespace may not have."""
    group = os.getegid()
    try:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        with open(os.__file__, "rb"):
            return all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in readable if os.path.isdir(path))
    except OSError:
        return False
    finally:
        os.seteuid(0)
        os.setegid(group)


def _become_nobody() -> None:
    """Who gets the working folder."""
    os.chown(".", NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _seccomp() -> None:
    """System calls that are not allowed fail with ENOSYS from now on."""
    machine = platform.machine()
    if machine not in system_calls.AUDIT:
        raise OSError(0, f"system calls of {machine} are not known")
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | 38
    load_number, load_second = (0x20, 0, 0, 0), (0x20, 0, 0, 24)
    # Classic BPF: (code, jump if true, jump if false, value) on struct seccomp_data {nr, arch, instruction, arguments[6]}. A jump
    # goes to the end of its own group: its last step allows.
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, system_calls.AUDIT[machine]), (0x06, 0, 0, kill), load_number]
    for number, values in system_calls.by_argument(machine):
        program += [(0x15, 0, len(values) + 3, number), load_second]
        program += [(0x15, len(values) - place, 0, value) for place, value in enumerate(values)]
        program += [(0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
    numbers = system_calls.numbers(machine)
    program += [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [(0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    # struct sock_fprog: a length, padding, a pointer.
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(raw)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters)


def _call(number: int, *arguments: object) -> int:
    done = int(LIBC.syscall(number, *arguments))
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"system call {number}: {os.strerror(error)}")
    return done


def _prctl(option: int, value: int, more: object = 0) -> None:
    if LIBC.prctl(option, value, more, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def begin() -> tuple[dict, int]:
    """A script's start: (its job, where it reports). The job is JSON on the standard input, with the arguments of ``enter``; the
    first line of the report is ``fenced`` and what is missing, or ``refused`` and why, and the process ends."""
    import json

    job = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    try:
        missing = enter(job["folder"], job["readable"], job["seconds"], job["memory"])
    except (OSError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        os.write(report, f"{json.dumps({'refused': reason})}\n".encode())
        os._exit(3)
    os.write(report, f"{json.dumps({'fenced': missing})}\n".encode())
    return job, report
