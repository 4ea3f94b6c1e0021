"""The ledger against a fake clock, a scripted meter, and real memory."""

import mmap
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
        self.device = None  # bytes in use on it that are not torch's

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

    def others(self):
        return {} if self.device is None else {"others": self.device}

    def mark(self):
        return None


class Stream:
    """Kernels take seconds on the device and none on the host; an event has a time once the device has got to it."""

    def __init__(self, clock):
        self.clock, self.done = clock, clock.now  # when the device will have run what is queued

    def queue(self, seconds):
        self.done = max(self.done, self.clock.now) + seconds

    def synchronize(self):
        self.clock.now = max(self.done, self.clock.now)

    def record(self):
        return Event(self, max(self.done, self.clock.now))


class Event:
    def __init__(self, stream, at):
        self.stream, self.at = stream, at

    def elapsed_time(self, other):
        assert self.stream.clock.now >= max(self.at, other.at), "read before the device got there"
        return (other.at - self.at) * 1e3


class StreamMeter(ScriptedMeter):
    def __init__(self, stream):
        super().__init__("allocated")
        self.stream = stream

    def synchronize(self):
        super().synchronize()
        self.stream.synchronize()

    def mark(self):
        return self.stream.record()


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
        "phase/evaluation/own_seconds": 5.0,
        "phase/evaluation/peak_gib": outer_peak,
    }


def test_an_exception_closes_the_phase_and_passes(house):
    ledger, clock, meter = house
    with pytest.raises(KeyboardInterrupt), ledger.phase("outer"), ledger.phase("inner"):
        clock.now += 3
        meter.spike(4)
        raise KeyboardInterrupt
    assert meter.synchronized == 1  # the outer entry, no exit: the device may be what failed
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
        assert ledger.take() == {}  # no event may be read before the outermost phase has waited
        clock.now += 1
    row = ledger.take()
    assert row["phase/save/seconds"] == 3.0 and row["phase/hash/seconds"] == 1.0
    assert meter.synchronized == 2


def test_bins_add_up_in_their_phases_and_own_seconds_add_up_to_the_whole(house):
    ledger, clock, meter = house
    seconds = {"forward": (1.0, 2.0, 0.5), "backward": (2.0, 4.0, 1.0)}
    spikes = {"forward": (3, 8, 4), "backward": (9, 5, 6)}
    for step in range(2):
        with ledger.phase("update"):
            clock.now += 0.25
            for bin_ in range(3):
                for name in ("forward", "backward"):
                    with ledger.phase(name):
                        clock.now += seconds[name][bin_]
                        meter.spike(spikes[name][bin_] + step)
                clock.now += 0.125
            with ledger.phase("optimizer"):
                clock.now += 0.5
                meter.spike(1)
            meter.spike(2)
    row = ledger.take()
    assert {key.split("/", 1)[1]: value for key, value in row.items()} == {
        "forward/seconds": 7.0,
        "forward/peak_gib": 9.0,
        "backward/seconds": 14.0,
        "backward/peak_gib": 10.0,
        "optimizer/seconds": 1.0,
        "optimizer/peak_gib": 1.0,
        "update/seconds": 23.25,
        "update/own_seconds": 2 * (0.25 + 3 * 0.125),
        "update/peak_gib": 10.0,
    }
    own = {key.split("/")[1]: row[key] for key in row if key.endswith("/seconds")}
    own |= {key.split("/")[1]: row[key] for key in row if key.endswith("/own_seconds")}
    assert sum(own.values()) == row["phase/update/seconds"]


def test_own_seconds_leave_out_children_and_not_grandchildren_twice(house):
    ledger, clock, _ = house
    for name in ("rollout", "evaluation"):  # "sync" is inside both, and also stands alone
        with ledger.phase(name):
            clock.now += 1
            with ledger.phase("sync"):
                clock.now += 2
                with ledger.phase("probe"):
                    clock.now += 4
    with ledger.phase("sync"):
        clock.now += 8
    row = {key: value for key, value in ledger.take().items() if key.endswith("seconds")}
    assert row == {
        "phase/probe/seconds": 8.0,
        "phase/sync/seconds": 20.0,
        "phase/sync/own_seconds": 12.0,
        "phase/rollout/seconds": 7.0,
        "phase/rollout/own_seconds": 1.0,
        "phase/evaluation/seconds": 7.0,
        "phase/evaluation/own_seconds": 1.0,
    }


def test_inside_a_phase_seconds_are_those_of_the_device_and_nobody_waits_for_it():
    clock = Clock()
    stream = Stream(clock)
    meter = StreamMeter(stream)
    ledger = Ledger(clock, meter)
    stream.queue(50.0)  # of before: waited for at the border, so nobody's
    with ledger.phase("update"):
        for _ in range(2):
            with ledger.phase("forward"):
                clock.now += 0.5  # the host queues for half a second what takes the device 3
                stream.queue(3.0)
            with ledger.phase("backward"):
                clock.now += 0.5
                stream.queue(6.0)
        with ledger.phase("optimizer"):
            clock.now += 40.0  # on the host alone, 22 of them while the device is still busy
    assert meter.synchronized == 2
    row = ledger.take()
    assert row["phase/forward/seconds"] == 0.5 + 3.0 + 3.0  # the device stood idle for the first half second
    assert row["phase/backward/seconds"] == 12.0
    assert row["phase/optimizer/seconds"] == 42.0 - 18.5
    assert row["phase/update/seconds"] == 42.0
    assert row["phase/update/own_seconds"] == 0.0


def test_a_failed_phase_has_the_host_s_seconds_and_the_device_is_not_asked():
    clock = Clock()
    meter = StreamMeter(Stream(clock))
    meter.device = 2 * GIB
    ledger = Ledger(clock, meter)
    with ledger.phase("update"):
        with pytest.raises(MemoryError), ledger.phase("forward"):  # does not fit, and is tried again
            clock.now += 1
            meter.stream.queue(100.0)
            meter.device = 9 * GIB
            raise MemoryError
        meter.device = 3 * GIB
        with ledger.phase("forward"):
            meter.stream.queue(5.0)
    row = ledger.take()
    assert row["phase/forward/seconds"] == 6.0
    assert row["phase/forward/others_gib"] == 2.0 and row["phase/update/others_gib"] == 3.0  # 9 was never asked for
    with pytest.raises(RuntimeError), ledger.phase("update"), ledger.phase("backward"):
        clock.now += 2
        meter.stream.queue(7.0)  # is never reached: no event may be read
        raise RuntimeError
    row = ledger.take()
    assert row["phase/backward/seconds"] == row["phase/update/seconds"] == 2.0
    with pytest.raises(RuntimeError), ledger.phase("update"):
        with ledger.phase("forward"):  # ends whole, but what it queued may be what failed: its events stay unread
            clock.now += 3
            meter.stream.queue(50.0)
        raise RuntimeError
    assert ledger.take()["phase/forward/seconds"] == 3.0
    with ledger.phase("update"):  # nothing is left over from it
        pass
    assert set(ledger.take()) == {f"phase/update/{key}" for key in ("seconds", "peak_gib", "others_gib")}


def test_others_are_the_most_that_was_seen_at_a_border(house):
    ledger, _, meter = house
    meter.device = 1 * GIB
    with ledger.phase("rollout"):
        with ledger.phase("wake"):
            meter.device = 40 * GIB  # an engine's own pool
        with ledger.phase("sleep"):
            meter.device = 2 * GIB
    with ledger.phase("update"):
        meter.device = 99 * GIB  # between two borders nobody looks
        meter.device = 3 * GIB
    row = {key: value for key, value in ledger.take().items() if key.endswith("others_gib")}
    assert row == {
        "phase/wake/others_gib": 40.0,
        "phase/sleep/others_gib": 40.0,
        "phase/rollout/others_gib": 40.0,
        "phase/update/others_gib": 3.0,
    }


def test_the_driver_is_asked_at_the_first_of_many_bins_only(house):
    ledger, _, meter = house
    asked = []
    meter.others = lambda: asked.append(None) or {"others": len(asked) * GIB}
    for _ in range(2):
        with ledger.phase("update"):
            for _ in range(50):
                with ledger.phase("forward"):
                    pass
                with ledger.phase("backward"):
                    pass
    assert len(asked) == 2 * 3 * 2
    row = ledger.take()
    assert [row[f"phase/{name}/others_gib"] for name in ("forward", "backward", "update")] == [9.0, 11.0, 12.0]


class FakeCuda:
    """torch.cuda as far as the meter uses it."""

    def __init__(self):
        self.current = {"allocated": 5, "reserved": 8}
        self.peak = {"allocated": 7, "reserved": 12}
        self.pinned, self.free, self.total = 3, 50, 80
        self.memory_stats_as_nested_dict = lambda: {
            f"{kind}_bytes": {"all": {"current": self.current[kind] * GIB, "peak": self.peak[kind] * GIB}}
            for kind in self.current
        }
        self.reset_peak_memory_stats = lambda: self.peak.update(self.current)
        self.host_memory_stats_as_nested_dict = lambda: {"allocated_bytes": {"peak": self.pinned * GIB}}
        self.reset_peak_host_memory_stats = lambda: setattr(self, "pinned", 1)
        self.mem_get_info = lambda: (self.free * GIB, self.total * GIB)


def test_the_meter_reads_the_allocators_and_leaves_torch_s_own_out_of_others(monkeypatch, tmp_path):
    cuda = FakeCuda()
    monkeypatch.setattr("grpo.ledger._cuda", lambda: cuda)
    meter = MemoryMeter(tmp_path)
    assert meter.peaks() == {"allocated": 7 * GIB, "reserved": 12 * GIB, "pinned": 3 * GIB}
    assert meter.others() == {"others": (80 - 50 - 8) * GIB}
    assert meter.peaks() == {"allocated": 5 * GIB, "reserved": 8 * GIB, "pinned": 1 * GIB}  # anew
    cuda.free = 79  # the driver may lag behind the allocator
    assert meter.others() == {"others": 0}
    assert Ledger(meter=meter).take() == {}


def test_a_run_on_the_cpu_reports_the_process_though_somebody_touched_a_device(monkeypatch):
    monkeypatch.setattr("grpo.ledger._cuda", FakeCuda)
    meter = MemoryMeter()
    assert "allocated" in meter.peaks() and meter.others()
    meter.host_only = True
    assert meter.peaks().keys() == {"resident"}
    assert meter.others() == {} and meter.mark() is None
    meter.synchronize()  # the stand-in has nothing to wait with


def test_what_an_engine_unmapped_is_not_on_the_device_though_torch_counts_it(monkeypatch, tmp_path):
    """A cache of 30 GiB that torch counts all the time, mapped while sampling alone."""
    cuda, asleep = FakeCuda(), [30]
    cuda.current = {"allocated": 30 + 5, "reserved": 30 + 8}
    cuda.peak = dict(cuda.current)
    cuda.free = 80 - 8 - 2  # two are somebody else's
    monkeypatch.setattr("grpo.ledger._cuda", lambda: cuda)
    meter = MemoryMeter(tmp_path)
    meter.synchronize, meter.mark = lambda: None, lambda: None
    meter.unmapped = lambda: asleep[0] * GIB
    meter.peaks()
    ledger = Ledger(meter=meter)
    with ledger.phase("rollout"):
        with ledger.phase("wake"):
            asleep[0], cuda.free = 0, cuda.free - 30
        cuda.peak = {"allocated": 30 + 6, "reserved": 30 + 8}
        with ledger.phase("sleep"):
            asleep[0], cuda.free = 30, cuda.free + 30
    with ledger.phase("update"):
        cuda.peak = {"allocated": 30 + 7, "reserved": 30 + 9}
    row = ledger.take()
    assert [row[f"phase/{name}/peak_gib"] for name in ("wake", "rollout", "sleep", "update")] == [35.0, 36.0, 35.0, 7.0]
    assert [row[f"phase/{name}/reserved_gib"] for name in ("rollout", "update")] == [38.0, 9.0]
    assert [row[f"phase/{name}/others_gib"] for name in ("wake", "rollout", "sleep", "update")] == [2.0] * 4


def test_a_meter_gives_its_files_back():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        assert MemoryMeter().peaks()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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

    meter = Device()
    meter.device = 2 * GIB
    ledger = Ledger(Clock(), meter)
    with ledger.phase("update"):
        pass
    assert ledger.take() == {
        "phase/update/seconds": 0.0,
        "phase/update/peak_gib": 20.0,
        "phase/update/resident_gib": 1.0,
        "phase/update/reserved_gib": 24.0,
        "phase/update/pinned_gib": 3.0,
        "phase/update/others_gib": 2.0,
    }


def touch(mib):
    """`mib` MiB of new pages, written to, that go back to the system when freed; malloc may have old ones at hand."""
    buffer = mmap.mmap(-1, mib * MIB)
    for page in range(0, mib * MIB, mmap.PAGESIZE):
        buffer[page] = 1
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


@pytest.mark.gpu
def test_on_a_device_bins_have_their_own_seconds_and_peaks_without_waiting():
    import torch

    torch.cuda.init()
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    ledger = Ledger()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(4)]
    queued = 0.0
    with ledger.phase("update"):
        start = time.perf_counter()
        for index, (first, last) in enumerate(events):
            with ledger.phase(("forward", "backward")[index % 2]):
                first.record()
                for _ in range((5, 20)[index % 2]):
                    matrix @ matrix
                last.record()
                spike = torch.empty((256, 1024)[index % 2] * MIB, dtype=torch.uint8, device="cuda")
                del spike
        queued = time.perf_counter() - start
    row = ledger.take()
    seconds = [first.elapsed_time(last) / 1e3 for first, last in events]
    assert queued < sum(seconds) / 2  # nobody waited between the bins
    assert row["phase/forward/seconds"] == pytest.approx(seconds[0] + seconds[2], rel=0.05, abs=1e-3)
    assert row["phase/backward/seconds"] == pytest.approx(seconds[1] + seconds[3], rel=0.05, abs=1e-3)
    assert row["phase/update/seconds"] >= row["phase/forward/seconds"] + row["phase/backward/seconds"] - 1e-3
    assert 0.7 < row["phase/backward/peak_gib"] - row["phase/forward/peak_gib"] < 0.8
    assert row["phase/update/peak_gib"] == row["phase/backward/peak_gib"]
    assert 0.1 < row["phase/update/others_gib"] < torch.cuda.get_device_properties(0).total_memory / GIB
