"""The tiers in which model-written code may run: how each is built, and what it does not protect against.

Source: REWARDS.md section 7 (31 probes, 26 hostile). None is a default and none replaces another: a tier that cannot
be built on a machine is an error. What can be said is "0 of N listed probes get through", never "secure".
As root, tests become `nobody`. Started by another user they stay this user: in the tiers without Landlock, what that
user may read, write or end, the trainer itself included, is open to them.
Left out: import lists and patched builtins inside one process, which keep out nothing deliberate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class SandboxError(RuntimeError):
    """The sandbox failed, not the code in it: no tier, a layer that is missing, an outage. Never a score."""


class Tier(NamedTuple):
    """One tier: the layers that tests get, how it is built, what remains open."""

    layers: tuple[str, ...]
    how: str
    not_against: str


_OPEN = "kernel bugs, CPU side channels, world-readable files under the paths that Python needs, many small files"
TIERS = {
    "process": Tier(
        (),
        "own process, session and memory limits, clean environment, temporary folder, output cap",
        "reading files and the trainer's memory and environment, writing files elsewhere, sockets, starting programs, "
        "ending other processes of this user, many small files",
    ),
    "namespace": Tier(
        ("namespaces",),
        "process + own user, network, IPC and PID namespaces",
        "reading files, writing files elsewhere, starting programs, Unix sockets, many small files, kernel bugs",
    ),
    "confined": Tier(("landlock", "seccomp"), "process + Landlock + seccomp allowlist + no_new_privs", _OPEN),
    "bubblewrap": Tier(
        ("seccomp",), "bwrap with every namespace, read-only system, empty /tmp + process + seccomp allowlist", _OPEN
    ),
    "remote": Tier(
        (),
        "HTTP to a sandbox service, with a deadline and size limits",
        "whatever the service does not protect against; the service sees code and inputs, never expectations",
    ),
}


def check_tier(tier: Any) -> str:
    """`tier`, when it is the name of one. Raises SandboxError that lists them."""
    if tier not in TIERS:
        given = "no tier is named" if tier is None else f"{tier!r} is no tier"
        raise SandboxError(f"running model-written code: {given} (want one of {', '.join(TIERS)})")
    return str(tier)


def describe(tier: str) -> str:
    """One line: the tier, how it is built, what it does not protect against. Raises SandboxError for another name.

    >>> describe("namespace")[:81]
    'code runs in tier namespace (process + own user, network, IPC and PID namespaces)'
    """
    row = TIERS[check_tier(tier)]
    return f"code runs in tier {tier} ({row.how}); this does not protect against: {row.not_against}"


@dataclass(frozen=True)
class Limits:
    """What one test may use, and all tests of one completion together.

    Attributes:
        timeout_s: wall seconds of a test; its CPU seconds are limited to 2 more.
        total_s: wall seconds of all tests of a completion, start included; later tests count as timed out.
        memory_bytes: address space (a process without threads of 8 MiB stacks needs 30 MiB).
        output_bytes: of each of stdout, stderr and the result; more ends the test.
        file_bytes: size of a file.
        num_files: open descriptors.
        num_processes: processes and threads beyond those that the user has; not enforced on `confined` (no processes).
    """

    timeout_s: float = 5.0
    total_s: float = 60.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    num_files: int = 64
    num_processes: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Limits: {name} is {value} (want more than 0)")


@dataclass(frozen=True)
class Request:
    """One test's input: text for stdin, and for a function test the call as `values` writes it."""

    stdin: str = ""
    call: Any = None


@dataclass(frozen=True)
class Outcome:
    """What came out of one test, not whether it is right.

    Attributes:
        status: "ok" (ran to its end), "error" (exception, exit code, signal), "timeout", "output" (too much of it),
            "forged" (no result, or not exactly one, or not a plain value).
        stdout: text; bytes that are no UTF-8 are replaced.
        value: what the call returned.
        detail: for people: the end of stderr.
    """

    status: str
    stdout: str = ""
    value: Any = None
    detail: str = ""
