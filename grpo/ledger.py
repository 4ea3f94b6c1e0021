"""The ledger: seconds and memory of every phase of a step. Always on.

    with ledger.phase("update"):
        for batch in batches:
            with ledger.phase("forward"): …
    row |= ledger.take()

| `phase/<name>/…` | |
|---|---|
| `seconds` | of the phase, those inside it included |
| `own_seconds` | `seconds` less those of the phases directly inside it, only where there were any: these add up |
| `peak_gib` | torch's allocator on the current device at its highest; without CUDA the process's resident memory |
| `reserved_gib` | what torch held on the device for that |
| `others_gib` | device memory that is not torch's: other processes, CUDA's context, an engine's own pool |
| `resident_gib`, `pinned_gib` | the process's resident memory, and torch's page-locked host memory |

A peak is the highest of the whole process while the phase was open, what stood there before it included; peaks of
phases do not add up. A nested phase is part of its parent: its seconds and its peaks count for both.

`others_gib` is the highest of what the driver said at the borders of the phase and of those inside it, the first time
through each. Outermost phases wait for the device at both borders. Phases inside one never wait (that would drain the
queue of kernels between forward and backward): an event is recorded on the current stream at each border, and read
once the outermost phase has waited. torch is never imported here, only used when it is loaded. Left out: threads (one
ledger belongs to the thread that trains), other devices and streams than the current, and plans (the planner's).
"""

from __future__ import annotations

import os
import sys
import time
import weakref
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
    inside it; where there is no /proc there is none. `source` says which of the three holds. Both files stay open:
    opening them at every border would cost more than reading them.

    With CUDA in use also `allocated` and `reserved` (torch's allocator, current device) and `pinned` (torch's
    page-locked host memory). torch's peak counters are reset at each reading, which does not wait for the device: the
    allocators count on the host. `unmapped` says how many bytes torch counts that are not on the device now (the cache
    of a sleeping engine); they are taken off, unless they were there at the last reading. `host_only`: the run is on
    the CPU, whatever else has touched a device.
    """

    unmapped: Callable[[], int] = staticmethod(lambda: 0)
    host_only = False

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._status = self._keep_open(proc / "status", os.O_RDONLY)
        self._clear_refs = self._keep_open(proc / "clear_refs", os.O_WRONLY)
        self._reserved = self._unmapped = 0
        self._key = b"VmHWM:" if self._reset_resident() else b"VmRSS:"
        if self._status is None:
            self.source = f"none ({proc / 'status'} cannot be read)"
        elif self._key == b"VmHWM:":
            self.source = "peak resident memory of the process (VmHWM)"
        else:
            self.source = f"resident memory at phase borders only ({proc / 'clear_refs'} is not writable)"

    def _keep_open(self, path: Path, mode: int) -> int | None:
        try:
            descriptor = os.open(path, mode)
        except OSError:
            return None
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _cuda(self) -> Any:
        return None if self.host_only else _cuda()

    def synchronize(self) -> None:
        """Wait for the device, if one is in use."""
        if (cuda := self._cuda()) is not None:
            cuda.synchronize()

    def mark(self) -> Any:
        """An event on the current stream, or None where no device is in use."""
        if (cuda := self._cuda()) is None:
            return None
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def peaks(self) -> Peaks:
        """Highest bytes since the last call, and start anew."""
        return self._resident() | self._device()

    def others(self) -> Peaks:
        """`others`: bytes in use on the device now, by the driver, less what torch had reserved at the last `peaks`."""
        if (cuda := self._cuda()) is None:
            return {}
        free, total = cuda.mem_get_info()
        return {"others": max(0, total - free - self._reserved)}

    def _resident(self) -> Peaks:
        if self._status is None:
            return {}
        _, found, rest = os.pread(self._status, 8192, 0).partition(self._key)
        self._reset_resident()
        return {"resident": int(rest.split(maxsplit=1)[0]) * 1024} if found else {}

    def _reset_resident(self) -> bool:
        if self._clear_refs is None:
            return False
        try:
            os.pwrite(self._clear_refs, b"5", 0)
        except OSError:
            self._clear_refs, self._key = None, b"VmRSS:"
            return False
        return True

    def _device(self) -> Peaks:
        cuda = self._cuda()
        if cuda is None:
            return {}
        stats = cuda.memory_stats_as_nested_dict()  # one call; memory_stats() flattens it, which costs more
        now = self.unmapped()
        gone, self._unmapped = min(now, self._unmapped), now
        peaks = {kind: stats[f"{kind}_bytes"]["all"]["peak"] - gone for kind in ("allocated", "reserved")}
        self._reserved = stats["reserved_bytes"]["all"]["current"] - now
        cuda.reset_peak_memory_stats()
        if hasattr(cuda, "host_memory_stats_as_nested_dict"):
            pinned = cuda.host_memory_stats_as_nested_dict().get("allocated_bytes")
            if pinned is not None:
                peaks["pinned"] = pinned["peak"]
                cuda.reset_peak_host_memory_stats()
        return peaks


def _cuda() -> Any:
    """`torch.cuda` if torch is loaded and has touched a device, else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


@dataclass
class _Span:
    """One time through a phase. `marks` are the device's events at its borders, None where it ended without them."""

    name: str
    parent: _Span | None
    start: float = 0.0
    first_mark: Any = None
    last_mark: Any = None
    seconds: float = 0.0  # by the host's clock
    peaks: Peaks = field(default_factory=dict)

    def by_device(self) -> float:
        """Seconds between the two events, else the host's."""
        if self.first_mark is None or self.last_mark is None:
            return self.seconds
        return float(self.first_mark.elapsed_time(self.last_mark)) / 1e3


@dataclass
class _Account:
    seconds: float = 0.0
    inside: float | None = None  # seconds of the phases directly inside
    peaks: Peaks = field(default_factory=dict)


def _raise_to(peaks: Peaks, others: Peaks) -> None:
    for kind, value in others.items():
        peaks[kind] = max(value, peaks.get(kind, 0))


class Ledger:
    """Accumulates time and peak memory by phase name until `take`.

    Args:
        clock: monotonic seconds.
        meter: where the bytes and the events come from.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, meter: MemoryMeter | None = None) -> None:
        self._clock = clock
        self.meter = MemoryMeter() if meter is None else meter
        self._open: list[_Span] = []  # outermost first
        self._ended: list[_Span] = []  # inside the outermost that is open
        self._accounts: dict[str, _Account] = {}

    @property
    def memory_source(self) -> str:
        """What `peak_gib` means without CUDA, in words."""
        return self.meter.source

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Bill everything inside to `name`, also when it ends in an exception; then the device is neither waited for
        nor asked, since it may be what failed, and seconds are the host's.

        Raises:
            ValueError: the phase is open already (its seconds would count twice), or its name has a "/".
        """
        if "/" in name or any(span.name == name for span in self._open):
            raise ValueError(f"phase {name!r}: {'has a /' if '/' in name else 'is open already'}")
        span = self._begin(name)
        whole = False
        try:
            yield
            if span.parent is None:
                self.meter.synchronize()
            else:
                span.last_mark = self.meter.mark()
            whole = True
        finally:
            self._end(span, whole)

    def take(self) -> dict[str, float]:
        """The row `phase/<name>/…` (see above) of all that closed since the last call, and clear it.

        Kinds of memory that cannot be read are left out. A phase that is open, and those inside it, go into a later
        call.
        """
        row: dict[str, float] = {}
        for name, account in self._accounts.items():
            row[f"phase/{name}/seconds"] = account.seconds
            if account.inside is not None:
                row[f"phase/{name}/own_seconds"] = max(0.0, account.seconds - account.inside)
            peaks = dict(account.peaks)
            main = "allocated" if "allocated" in peaks else "resident"
            if main in peaks:
                row[f"phase/{name}/peak_gib"] = peaks.pop(main) / GIB
            row |= {f"phase/{name}/{kind}_gib": value / GIB for kind, value in peaks.items()}
        self._accounts = {}
        return row

    def _begin(self, name: str) -> _Span:
        parent = self._open[-1] if self._open else None
        if parent is None:
            self.meter.synchronize()
        others = self._harvest(self._is_first(name))  # what stands at a border counts on both sides of it
        span = _Span(name, parent, peaks=others)
        span.start, span.first_mark = self._clock(), None if parent is None else self.meter.mark()
        self._open.append(span)
        return span

    def _end(self, span: _Span, whole: bool) -> None:
        span.seconds = self._clock() - span.start
        self._harvest(whole and self._is_first(span.name))
        self._open.pop()
        self._ended.append(span)
        if span.parent is None:
            self._bill(whole)

    def _is_first(self, name: str) -> bool:
        """Whether the driver is asked: not at every bin, which is felt on a busy device, and it has no peak to miss."""
        return all(ended.name != name for ended in self._ended)

    def _harvest(self, ask_driver: bool) -> Peaks:
        """What was used since the last border belongs to every phase that is open. Returns what others have now."""
        peaks = self.meter.peaks()
        others = self.meter.others() if ask_driver else {}
        for span in self._open:
            _raise_to(span.peaks, peaks)
            _raise_to(span.peaks, others)
        return others

    def _bill(self, whole: bool) -> None:
        """The spans that ended, innermost first, so that a row names a phase before the one it is inside."""
        times = [span.by_device() if whole else span.seconds for span in self._ended]
        for span, seconds in zip(self._ended, times, strict=True):
            account = self._accounts.setdefault(span.name, _Account())
            account.seconds += seconds
            _raise_to(account.peaks, span.peaks)
        for span, seconds in zip(self._ended, times, strict=True):
            if span.parent is not None:
                parent = self._accounts[span.parent.name]
                parent.inside = (parent.inside or 0.0) + seconds
        self._ended = []
