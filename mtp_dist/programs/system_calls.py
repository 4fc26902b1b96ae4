"""The system calls that a jailed program may make, by name: numbers on x86-64 (asm/unistd_64.h) and on 64-bit Arm
(asm-generic/unistd.h). None: that machine does not have it.

A list of what is allowed, so that a call that a later kernel adds is refused. Whatever is not here fails with ENOSYS, for which
C libraries have a way round: processes and threads, other programs, sockets, signals to others, tracing, namespaces and mounts,
the host's name and clock, keys, BPF, io_uring, limits, shared memory.
"""

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""linux/audit.h: what a filter sees as the architecture."""

ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # Files that the file fence lets pass: reading, writing, names in one flat folder (no folders, links, modes, owners or times).
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "open": (2, None),
    "openat": (257, 56),
    "creat": (85, None),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, None),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "ftruncate": (77, 46),
    "truncate": (76, 45),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "flock": (73, 32),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "umask": (95, 166),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    # Memory.
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "msync": (26, 227),
    "membarrier": (324, 283),
    # Waiting, clocks that can only be read, signals from oneself.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "pause": (34, None),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "restart_syscall": (219, 128),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    # Facts about oneself.
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getrlimit": (97, 163),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "getrandom": (318, 278),
    # What the C library needs to run and to end.
    "futex": (202, 98),
    "futex_waitv": (449, 449),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
}

BY_ARGUMENT: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    # Duplicates, flags and locks; F_SETOWN and F_SETSIG would send signals to other processes.
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)),
    # Is it a terminal (TCGETS, TIOCGWINSZ), close on exec or not, bytes to read.
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x5451, 0x5450, 0x541B)),
}
"""Allowed with these values of the second argument only."""


def numbers(machine: str) -> list[int]:
    """Of the calls that are allowed whatever their arguments. KeyError for a machine that is not known."""
    column = list(AUDIT).index(machine) if machine in AUDIT else None
    if column is None:
        raise KeyError(machine)
    return [found for pair in ALLOWED.values() if (found := pair[column]) is not None]


def by_argument(machine: str) -> list[tuple[int, tuple[int, ...]]]:
    """(number, values of the second argument)."""
    column = list(AUDIT).index(machine)
    return [(pair[column], values) for pair, values in BY_ARGUMENT.values()]
