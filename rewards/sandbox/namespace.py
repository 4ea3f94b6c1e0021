"""Layers of the tier `namespace`: an own user, network and IPC namespace, and an own PID namespace for each test.

Sources: user_namespaces(7), network_namespaces(7), pid_namespaces(7). Runs in the supervisor, outside any package:
imports the standard library and its sister modules only. Left out: mount namespaces (see the tier `bubblewrap`).
"""

from __future__ import annotations

import ctypes
import os

_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_SIGCHLD = 17
_CLONE = {"x86_64": 56, "aarch64": 220}


def enter() -> None:
    """Move this process to new user, network and IPC namespaces; its user keeps its number. Raises OSError.

    The network has nothing but a loopback interface that is down. Distributions and container profiles that forbid
    user namespaces make this fail with EPERM or ENOSPC.
    """
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib would cost the supervisor milliseconds
            file.write(text)


def fork_first() -> int:
    """`os.fork()` whose child is process 1 of a new PID namespace: when it ends, all in there are killed.

    Raises OSError, also on an architecture whose clone(2) number is not known.
    """
    number = _CLONE.get(os.uname().machine)
    if number is None:
        raise OSError(f"clone: unknown number on {os.uname().machine}")
    libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: no other Python thread may run between these calls
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = libc.syscall(number, ctypes.c_ulong(_NEW_PID | _SIGCHLD), None, None, None, ctypes.c_ulong(0))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"clone: {os.strerror(code)}")
    return int(pid)
