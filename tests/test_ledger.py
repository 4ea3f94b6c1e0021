"""The ledger against a fake clock, a scripted meter, and real memory."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.ledger import GIB, Ledger, MemoryMeter

MIB = 2**20


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class ScriptedMeter(MemoryMeter):
    """Plays a process whose memory the test sets; remembers the peak since the last reading, as the kernel does."""

    def __init__(self, kind="resident"):
        self.kind = kind
        self.source = "script"
        self.level = self.peak = 0
        self.synchronized = 0

    def use(self, gib):
        self.level = gib * GIB
        self.peak = max(self.peak, self.level)

    def spike(self, gib):
        before = self.level
        self.use(gib)
        self.level = before

    def synchronize(self):
        self.synchronized += 1

    def peaks(self):
        peak, self.peak = self.peak, self.level
        return {self.kind: peak}


@pytest.fixture
def house():
    clock, meter = Clock(), ScriptedMeter()
    return Ledger(clock, meter), clock, meter


def test_seconds_add_up_and_peaks_take_the_highest(house):
    ledger, clock, meter = house
    for seconds, gib in ((2.0, 3), (0.5, 5), (1.25, 1)):
        with ledger.phase("update"):
            clock.now += seconds
            meter.spike(gib)
        clock.now += 50  # outside any phase: nobody's
        meter.spike(99)
    assert ledger.take() == {"phase/update/seconds": 3.75, "phase/update/peak_gib": 5.0}
    assert ledger.take() == {}


def test_memory_that_stands_counts_for_each_phase_and_a_spike_for_its_own(house):
    ledger, _, meter = house
    meter.use(1)
    with ledger.phase("rollout"):
        meter.spike(7)
    with ledger.phase("score"):
        pass
    with ledger.phase("update"):
        meter.use(2)
    row = ledger.take()
    assert [row[f"phase/{name}/peak_gib"] for name in ("rollout", "score", "update")] == [7.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("before", "inside", "after", "outer_peak"), [(6, 2, 1, 6.0), (1, 6, 2, 6.0), (1, 2, 6, 6.0), (0, 0, 0, 0.0)]
)
def test_a_nested_phase_is_part_of_its_parent(house, before, inside, after, outer_peak):
    ledger, clock, meter = house
    with ledger.phase("evaluation"):
        clock.now += 1
        meter.spike(before)
        with ledger.phase("score"):
            clock.now += 2
            meter.spike(inside)
        meter.spike(after)
        clock.now += 4
    assert ledger.take() == {
        "phase/score/seconds": 2.0,
        "phase/score/peak_gib": float(inside),
        "phase/evaluation/seconds": 7.0,
        "phase/evaluation/peak_gib": outer_peak,
    }


def test_an_exception_closes_the_phase_and_passes(house):
    ledger, clock, meter = house
    with pytest.raises(KeyboardInterrupt), ledger.phase("outer"), ledger.phase("inner"):
        clock.now += 3
        meter.spike(4)
        raise KeyboardInterrupt
    assert meter.synchronized == 2  # both entries, no exit: the device may be what failed
    with ledger.phase("inner"):
        clock.now += 1
    row = ledger.take()
    assert row["phase/inner/seconds"] == 4.0
    assert row["phase/outer/seconds"] == 3.0
    assert row["phase/outer/peak_gib"] == 4.0


def test_an_open_phase_goes_into_a_later_row(house):
    ledger, clock, meter = house
    with ledger.phase("save"):
        clock.now += 1
        with ledger.phase("hash"):
            clock.now += 1
        assert set(ledger.take()) == {"phase/hash/seconds", "phase/hash/peak_gib"}
        clock.now += 1
    assert ledger.take()["phase/save/seconds"] == 3.0
    assert meter.synchronized == 4


@pytest.mark.parametrize("name", ["rollout", "a/b"])
def test_names_that_would_count_wrongly_are_refused(house, name):
    ledger, clock, _ = house
    with ledger.phase("rollout"):
        clock.now += 1
        with pytest.raises(ValueError, match=repr(name)), ledger.phase(name):
            pass
    assert ledger.take()["phase/rollout/seconds"] == 1.0


def test_with_a_device_the_peak_is_the_device_s():
    class Device(ScriptedMeter):
        def peaks(self):
            return {"resident": 1 * GIB, "allocated": 20 * GIB, "reserved": 24 * GIB, "pinned": 3 * GIB}

    ledger = Ledger(Clock(), Device())
    with ledger.phase("update"):
        pass
    assert ledger.take() == {
        "phase/update/seconds": 0.0,
        "phase/update/peak_gib": 20.0,
        "phase/update/resident_gib": 1.0,
        "phase/update/reserved_gib": 24.0,
        "phase/update/pinned_gib": 3.0,
    }


def touch(mib):
    """Allocate and write `mib` MiB that the allocator gives back to the system when freed."""
    buffer = ctypes.create_string_buffer(mib * MIB)
    ctypes.memset(buffer, 1, mib * MIB)
    return buffer


needs_reset = pytest.mark.skipif(
    not MemoryMeter().source.startswith("peak"), reason="/proc/self/clear_refs is not writable here"
)


@needs_reset
def test_a_real_peak_belongs_to_the_phase_that_had_it():
    ledger = Ledger()
    with ledger.phase("before"):
        pass
    with ledger.phase("big"):
        buffer = touch(200)
        del buffer  # gone before the border: only a high-water mark can see it
    with ledger.phase("after"):
        pass
    with ledger.phase("outer"), ledger.phase("inner"):
        buffer = touch(100)
        del buffer
    row = {key.split("/")[1]: value * 1024 for key, value in ledger.take().items() if key.endswith("peak_gib")}  # MiB
    assert 195 < row["big"] - row["before"] < 230
    assert abs(row["after"] - row["before"]) < 20
    assert 97 < row["inner"] - row["after"] < 120
    assert abs(row["outer"] - row["inner"]) < 5


@needs_reset
def test_the_absolute_value_is_the_resident_size():
    ledger = Ledger()
    with ledger.phase("now"):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert ledger.take()["phase/now/peak_gib"] == pytest.approx(resident / GIB, rel=0.02, abs=0.01)


def test_without_clear_refs_it_falls_back_to_the_borders_and_says_so(tmp_path):
    status = tmp_path / "status"
    status.write_text("VmHWM:\t  9000000 kB\nVmRSS:\t  1048576 kB\n")
    (tmp_path / "clear_refs").mkdir()  # cannot be written to, not even by root
    ledger = Ledger(meter=MemoryMeter(tmp_path))
    assert "borders only" in ledger.memory_source
    with ledger.phase("update"):
        status.write_text("VmHWM:\t  9000000 kB\nVmRSS:\t  2097152 kB\n")
    with ledger.phase("score"):
        status.write_text("VmHWM:\t  9000000 kB\nVmRSS:\t  1048576 kB\n")
    row = ledger.take()
    assert row["phase/update/peak_gib"] == 2.0  # VmHWM would be the whole life's
    assert row["phase/score/peak_gib"] == 1.0


def test_without_proc_there_is_no_peak_rather_than_a_wrong_one(tmp_path):
    ledger = Ledger(Clock(), MemoryMeter(tmp_path / "none"))
    assert ledger.memory_source.startswith("none")
    with ledger.phase("update"):
        pass
    assert ledger.take() == {"phase/update/seconds": 0.0}


def test_it_works_without_torch_and_does_not_import_it():
    program = (
        "import sys\nfrom grpo.ledger import Ledger\nledger = Ledger()\nwith ledger.phase('a'): pass\n"
        "assert ledger.take()['phase/a/seconds'] >= 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_phase_costs_less_than_50_microseconds_beside_the_proc_reads():
    class Nothing(ScriptedMeter):
        def peaks(self):
            return {}

    ledger = Ledger(meter=Nothing())

    def cost():
        start = time.perf_counter()
        for _ in range(200):
            with ledger.phase("update"):
                pass
        return (time.perf_counter() - start) / 200

    assert min(cost() for _ in range(5)) < 50e-6


@pytest.mark.gpu
def test_on_a_device_each_phase_has_its_own_peak_and_waits_for_its_kernels():
    import torch

    torch.cuda.init()
    standing = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    ledger = Ledger()
    with ledger.phase("big"):
        spike = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
        del spike
        matrix = torch.randn(8192, 8192, device="cuda")
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix)
        end.record()
        del matrix
    with ledger.phase("small"):
        pinned = torch.empty(128 * MIB, dtype=torch.uint8, pin_memory=True)
    row = ledger.take()
    assert row["phase/big/peak_gib"] >= (512 + 64) * MIB / GIB
    assert row["phase/small/peak_gib"] < row["phase/big/peak_gib"] - 0.3
    assert row["phase/big/reserved_gib"] >= row["phase/big/peak_gib"]
    assert row["phase/big/seconds"] >= start.elapsed_time(end) / 1000  # queued work is billed where it was queued
    assert row["phase/small/pinned_gib"] >= 128 * MIB / GIB > row["phase/big/pinned_gib"]
    assert row["phase/small/resident_gib"] > 0
    del standing, pinned
