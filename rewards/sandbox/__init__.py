"""Running model-written code, in a tier that the user names.

    with open_sandbox("confined", source) as box:
        outcome = box.run(Request(stdin="3 4"))

The child gets inputs only; what came out is an `Outcome`, and whether that is right is decided by the caller. Nothing
runs before a tier is named, and a tier that this machine cannot build is an error (`probe`), never another tier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.sandbox.process import LocalSandbox
from rewards.sandbox.tiers import TIERS, Limits, Outcome, Request, SandboxError, check_tier, describe

if TYPE_CHECKING:
    from rewards.sandbox.remote import RemoteSandbox

    Sandbox = LocalSandbox | RemoteSandbox

__all__ = ["open_sandbox", "probe", "describe", "Limits", "Request", "Outcome", "SandboxError", "TIERS"]

_PROBE = "print(sum(map(int, input().split())))"


def open_sandbox(
    tier: str | None,
    source: str,
    limits: Limits | None = None,
    *,
    url: str | None = None,
    service: str = "piston",
    headers: dict[str, str] | None = None,
) -> Sandbox:
    """A context in which `source` runs, once for each `Request`, in the named tier.

    Raises:
        SandboxError: no tier is named, or another; a layer is missing; `url` without, or not with, "remote".
    """
    tier = check_tier(tier)
    if (tier == "remote") != (url is not None):
        raise SandboxError(f"tier {tier} {'needs' if tier == 'remote' else 'takes no'} url=…")
    if tier == "remote":
        from rewards.sandbox.remote import RemoteSandbox  # http and ssl are slow to import

        return RemoteSandbox(str(url), source, limits, service, headers)
    prefix: tuple[str, ...] = ()
    if tier == "bubblewrap":
        from rewards.sandbox.bubblewrap import prefix as bubblewrap_prefix

        prefix = bubblewrap_prefix()
    return LocalSandbox(tier, source, limits, prefix)


def probe(
    tier: str | None, *, url: str | None = None, service: str = "piston", headers: dict[str, str] | None = None
) -> str:
    """Run one small program in the tier; the line of `describe` when it works.

    Raises:
        SandboxError: one line, with the layer that cannot be installed on this machine, or the outage.

    >>> probe(None)
    Traceback (most recent call last):
    rewards.sandbox.tiers.SandboxError: running model-written code: no tier is named (want one of process, namespace, \
confined, bubblewrap, remote)
    """
    with open_sandbox(tier, _PROBE, url=url, service=service, headers=headers) as box:
        outcome = box.run(Request("3 4\n"))
    if outcome.status != "ok" or outcome.stdout.strip() != "7":
        raise SandboxError(f"tier {tier}: a program that adds 3 and 4 gave {outcome}")
    return describe(str(tier))
