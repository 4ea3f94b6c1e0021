"""The tier `bubblewrap`: the supervisor and its tests inside bwrap, seeing a read-only system and an empty /tmp.

Source: bwrap(1), containers/bubblewrap. The interpreter's own folders are bound read-only, the test folder is the one
place to write to; every namespace is unshared, and the tests still run under limits and seccomp.
Left out: finding another program when bwrap is missing or may not make namespaces: that is an error.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rewards.sandbox.tiers import SandboxError

_HERE = Path(__file__).resolve().parent


def prefix(program: str = "bwrap") -> tuple[str, ...]:
    """The command line before the interpreter's; `{folder}` stands for the test folder. Raises SandboxError."""
    found = shutil.which(program)
    if found is None:
        raise SandboxError(f"tier bubblewrap: {program} is not installed")
    line = [found, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    for name, value in (("LANG", "C.UTF-8"), ("PYTHONHASHSEED", "0")):
        line += ["--setenv", name, value]
    line += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in bound():
        line += ["--ro-bind", path, path]
    return (*line, "--bind", "{folder}", "{folder}", "--chdir", "{folder}", "--cap-drop", "ALL", "--")


def bound() -> list[str]:
    """Folders that exist here and that the interpreter needs: the system's, its own, this package's."""
    wanted = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"]
    wanted += [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent), str(_HERE)]
    return [path for path in dict.fromkeys(wanted) if Path(path).exists()]
