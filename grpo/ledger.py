"""The ledger: seconds and peak memory of every phase of a step. Always on.

    with ledger.phase("rollout"): …
    row |= ledger.take()            # phase/rollout/seconds, phase/rollout/peak_gib

A peak is the highest memory of the whole process while the phase was open, what stood there before it included; peaks
of phases do not add up. A nested phase is part of its parent: its seconds and its peak count for both. torch is never
imported here, only used when it is loaded. Left out: threads (one ledger belongs to the thread that trains), devices
other than the current one, and plans (what should be needed is the planner's).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
Peaks = dict[str, int]  # bytes by kind of memory


class MemoryMeter:
    """Peak bytes since the last reading, by kind.

    `resident`: resident set of the process, from /proc (Linux). Writing "5" to /proc/self/clear_refs sets the
    kernel's high-water mark VmHWM back to the present size, so anyone else who reads VmHWM sees the peak since then.
    Where that file is not writable the value is the resident size *at the borders of the phase*, which misses peaks
    inside it; where there is no /proc there is none. `source` says which of the three holds.

    With CUDA in use also `allocated` and `reserved` (torch's allocator, current device) and `pinned` (torch's
    page-locked host memory). `torch.cuda.reset_peak_memory_stats` is called at each reading.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._status = proc / "status"
        self._clear_refs = proc / "clear_refs"
        self._resets = self._reset_resident()
        if self._resets:
            self.source = "peak resident memory of the process (VmHWM)"
        elif self._status.is_file():
            self.source = f"resident memory at phase borders only ({self._clear_refs} is not writable)"
        else:
            self.source = f"none ({self._status} does not exist)"

    def synchronize(self) -> None:
        """Wait for the device, if one is in use."""
        if (cuda := _cuda()) is not None:
            cuda.synchronize()

    def peaks(self) -> Peaks:
        """Highest bytes since the last call, and start anew."""
        return self._resident() | self._device()

    def _resident(self) -> Peaks:
        key = b"VmHWM:" if self._resets else b"VmRSS:"
        try:
            status = self._status.read_bytes()
        except OSError:  # no /proc, or no file descriptors left: that reading is missing, the run goes on
            return {}
        if self._resets:
            self._reset_resident()
        _, found, rest = status.partition(key)
        return {"resident": int(rest.split(maxsplit=1)[0]) * 1024} if found else {}

    def _reset_resident(self) -> bool:
        try:
            with self._clear_refs.open("wb", buffering=0) as file:
                file.write(b"5")
        except OSError:
            return False
        return True

    def _device(self) -> Peaks:
        cuda = _cuda()
        if cuda is None:
            return {}
        peaks = {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
        cuda.reset_peak_memory_stats()
        if hasattr(cuda, "host_memory_stats"):
            pinned = cuda.host_memory_stats().get("allocated_bytes.peak")
            if pinned is not None:
                peaks["pinned"] = pinned
                cuda.reset_peak_host_memory_stats()
        return peaks


def _cuda() -> Any:
    """`torch.cuda` if torch is loaded and has touched a device, else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


@dataclass
class _Account:
    seconds: float = 0.0
    peaks: Peaks = field(default_factory=dict)

    def raise_peaks(self, peaks: Peaks) -> None:
        for kind, value in peaks.items():
            self.peaks[kind] = max(value, self.peaks.get(kind, 0))


class Ledger:
    """Accumulates time and peak memory by phase name until `take`.

    Args:
        clock: monotonic seconds.
        meter: where the bytes come from.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, meter: MemoryMeter | None = None) -> None:
        self._clock = clock
        self._meter = MemoryMeter() if meter is None else meter
        self._open: dict[str, _Account] = {}  # outermost first
        self._closed: dict[str, _Account] = {}

    @property
    def memory_source(self) -> str:
        """What `peak_gib` means without CUDA, in words."""
        return self._meter.source

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Bill everything inside to `name`, also when it ends in an exception. The device is waited for at both
        borders, except after an exception: the device may be what failed.

        Raises:
            ValueError: the phase is open already (its seconds would count twice), or its name has a "/".
        """
        if name in self._open or "/" in name:
            raise ValueError(f"phase {name!r}: {'has a /' if '/' in name else 'is open already'}")
        self._meter.synchronize()
        self._harvest()
        account = self._open[name] = _Account()
        start = self._clock()
        try:
            yield
            self._meter.synchronize()
        finally:
            account.seconds = self._clock() - start
            self._harvest()
            self._close(name, account)

    def take(self) -> dict[str, float]:
        """`phase/<name>/seconds` and `phase/<name>/peak_gib` of the phases closed since the last call, and clear them.

        With CUDA in use `peak_gib` is what torch allocated on the device, and `reserved_gib`, `pinned_gib` and
        `resident_gib` (the process) stand beside it. Without CUDA it is the resident memory of the process; where
        even that cannot be read it is left out. A phase that is open goes into a later call.
        """
        row: dict[str, float] = {}
        for name, account in self._closed.items():
            row[f"phase/{name}/seconds"] = account.seconds
            peaks = dict(account.peaks)
            main = "allocated" if "allocated" in peaks else "resident"
            if main in peaks:
                row[f"phase/{name}/peak_gib"] = peaks.pop(main) / GIB
            row |= {f"phase/{name}/{kind}_gib": value / GIB for kind, value in peaks.items()}
        self._closed = {}
        return row

    def _harvest(self) -> None:
        """What was used since the last border belongs to every phase that is open."""
        peaks = self._meter.peaks()
        for account in self._open.values():
            account.raise_peaks(peaks)

    def _close(self, name: str, account: _Account) -> None:
        del self._open[name]
        total = self._closed.setdefault(name, _Account())
        total.seconds += account.seconds
        total.raise_peaks(account.peaks)
