"""Layers that a process puts on itself for good: Landlock, a seccomp allowlist, no_new_privs, no capabilities.

    reachable files  =  the rules of the Landlock ruleset, nothing else
    reachable kernel =  the rows of ALLOWED, on x86-64; another ABI kills the process, another call fails with EPERM

Sources: the kernel's Documentation/userspace-api/{landlock,seccomp_filter,no_new_privs}.rst, seccomp(2), capset(2);
numbers from arch/x86/entry/syscalls/syscall_64.tbl. Through ctypes, without root. Runs in the supervisor, outside any
package: imports the standard library only.
Left out: other architectures (refused), sockets, new processes and programs (never allowed; threads are).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

# --- no_new_privs, capabilities ---------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), what)


def no_new_privs() -> None:
    """Set-uid programs give nothing from here on. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")


def die_with_parent() -> None:
    """SIGKILL when the thread that started this process ends. Raises OSError."""
    _prctl(_PR_SET_PDEATHSIG, 9, "parent-death signal")


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, so that it can end them. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "child subreaper")


def hide_memory() -> None:
    """Nobody without CAP_SYS_PTRACE reads this process's memory or descriptors through /proc. Raises OSError."""
    _prctl(_PR_SET_DUMPABLE, 0, "dumpable")


def show_memory() -> None:
    """Undo `hide_memory`. Raises OSError."""
    _prctl(_PR_SET_DUMPABLE, 1, "dumpable")


def drop_capabilities() -> None:
    """Empty capability sets, also for root. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


# --- Landlock ----------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ON_FILES = 1 | 1 << 1 | _READ_FILE | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl: what a file may carry
_EXECUTE, _DEVICES = (
    1,
    1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 15,
)  # make char/sock/fifo/block/symlink, ioctl
_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # file-system rights an ABI knows; 16 from ABI 5 on


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 when it has none."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def landlock_ruleset(readable: Sequence[str], writable: Sequence[str]) -> int:
    """A descriptor of a ruleset: read below `readable`, also create, write and remove files below `writable`.

    Paths that do not exist are passed over. From ABI 4 on TCP is denied, from 6 on signals and abstract sockets too.
    Raises OSError when the kernel has no Landlock.
    """
    abi = landlock_abi()
    every = (1 << _BITS.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", every, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _checked(
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)), "Landlock"
    )
    for paths, rights in ((readable, _READ_FILE | _READ_DIR), (writable, every & ~(_EXECUTE | _DEVICES))):
        for path in paths:
            _allow(ruleset, path, rights)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib would cost the supervisor milliseconds
        rights &= _ON_FILES
    rule = struct.pack("=Qi", rights, place)
    _checked(_libc.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint32(0)), f"Landlock rule for {path}")
    os.close(place)


def restrict_files(ruleset: int) -> None:
    """Put this thread and all that it starts under the ruleset; needs no_new_privs. Raises OSError."""
    _checked(_libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "Landlock")


# --- seccomp -----------------------------------------------------------------------------------------------------

X86_64, X32_BIT = 0xC000003E, 0x40000000
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38

# What CPython needs to compute, import, read and write files, and run threads.
ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60,
    "uname": 63, "fsync": 74, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "rename": 82, "mkdir": 83,
    "rmdir": 84, "unlink": 87, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131,
    "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257,
    "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293, "renameat2": 316,
    "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
IOCTL, CLONE, FCNTL, TGKILL, PRLIMIT, CLONE3 = 16, 56, 72, 234, 302, 435
_ARGUMENT = (16, 24, 32, 40, 48, 56)  # where seccomp_data keeps the low halves, little-endian
# name, number, argument, its values: the low 32 bits, as the kernel declares these arguments as 32-bit
CHECKED = (
    (
        "ioctl",
        IOCTL,
        1,
        (0x5401, 0x5413, 0x5450, 0x5451, 0x541B),
    ),  # is it a terminal, its size, close-on-exec, FIONREAD
    ("fcntl", FCNTL, 1, (0, 1, 2, 3, 4, 1030)),  # duplicate, flags; no locks, owners, leases, pipe sizes
    ("prlimit64", PRLIMIT, 0, (0,)),  # only this process
)
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020080

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k: struct sock_filter


def seccomp_program(pid: int) -> list[Instruction]:
    """The filter of process `pid` as classic BPF. Kills on another ABI; ENOSYS for clone3, so that libc takes clone."""
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, X86_64), (_RETURN, 0, 0, KILL)]
    program += [(_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, X32_BIT), (_RETURN, 0, 0, KILL)]
    for number in ALLOWED.values():
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, ALLOW)]
    program += [(_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, ERRNO | ENOSYS)]
    for _, number, argument, values in (*CHECKED, ("tgkill", TGKILL, 0, (pid,))):
        body: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENT[argument])]
        for value in values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, ALLOW)]
        program += _when(number, body)
    threads: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENT[0]), (_ANY_BIT, 2, 0, CLONE_NAMESPACES)]
    threads += [(_ANY_BIT, 0, 1, CLONE_THREAD), (_RETURN, 0, 0, ALLOW)]
    return [*program, *_when(CLONE, threads), (_RETURN, 0, 0, ERRNO | EPERM)]


def _when(number: int, body: list[Instruction]) -> list[Instruction]:
    """`body` for this call alone; where it does not return, EPERM."""
    return [(_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, ERRNO | EPERM)]


def encoded(program: Sequence[Instruction]) -> bytes:
    """struct sock_filter[]: u16 code, u8 jt, u8 jf, u32 k, native byte order."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def check_architecture() -> None:
    """Raises OSError unless this is 64-bit Linux on x86-64, the one architecture with a table."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine != "x86_64" or sys.maxsize < 2**32:
        raise OSError(f"no seccomp table for {sys.platform} on {machine} (want linux on x86_64)")


def restrict_calls() -> None:
    """Put this thread and all that it starts under the filter; needs no_new_privs. Raises OSError."""
    check_architecture()
    code = encoded(seccomp_program(os.getpid()))
    program = _Program(len(code) // 8, code)
    _checked(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")
