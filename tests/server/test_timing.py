"""The seconds and calls of each part of a step: by the clock on CPUs, by events in the stream on CUDA devices."""

from types import SimpleNamespace

import pytest
import torch

from memdec.server.model import timing
from memdec.server.model.timing import PARTS, StepTimes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Stream:
    """A CUDA stream of which nothing is done before `passes` says so, and in which each event is a second after the one before."""

    def __init__(self) -> None:
        self.recorded = self.passed = 0
        self.capturing = False

    def passes(self, events: int) -> None:
        """Work is done up to this many further events."""
        self.passed += events

    def event(self, enable_timing: bool) -> "Event":
        """torch.cuda.Event."""
        assert enable_timing
        return Event(self)


class Event:
    """An event in a Stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.number = stream, 0

    def record(self) -> None:
        """Put it into the stream."""
        self.stream.recorded += 1
        self.number = self.stream.recorded

    def query(self) -> bool:
        """Whether the stream has passed it."""
        return self.number <= self.stream.passed

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds to another."""
        assert other.query(), "reading it would wait for the device"
        return 1e3 * (other.number - self.number)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """In the place of torch's."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    return stream


def test_every_part_is_there_from_the_start() -> None:
    """A scrape before the first request shows zeros, not gaps."""
    assert StepTimes().totals() == dict.fromkeys(PARTS, (0.0, 0))


def test_the_clock_around_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: seconds add up by part, and so do calls."""
    times, clock = StepTimes(), iter([10.0, 10.5, 20.0, 20.25, 30.0, 33.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for name in ("base", "base", "memory"):
        with times.part(name, CPU):
            pass
    assert times.totals() == {**dict.fromkeys(PARTS, (0.0, 0)), "base": (0.75, 2), "memory": (3.0, 1)}


def test_events_are_read_when_the_stream_has_passed_them(stream: Stream) -> None:
    """Nothing waits for the device, and no part is lost."""
    times = StepTimes()
    for name in ("base", "memory"):
        with times.part(name, CUDA):
            pass
    assert times.totals() == dict.fromkeys(PARTS, (0.0, 0))
    stream.passes(3)  # the second part has begun, but not ended
    assert times.totals()["base"] == (1.0, 1) and times.totals()["memory"] == (0.0, 0)
    stream.passes(1)
    assert times.totals()["base"] == (1.0, 1) and times.totals()["memory"] == (1.0, 1)


def test_events_don_t_pile_up_between_scrapes(stream: Stream) -> None:
    """Each part reads those that have passed, though nobody asks for the totals."""
    times = StepTimes()
    for _ in range(100):
        with times.part("base", CUDA):
            pass
        stream.passes(2)
    assert len(times.waiting) <= 1 and times.totals()["base"] == (100.0, 100)


def test_a_part_of_a_captured_graph_isn_t_timed(stream: Stream) -> None:
    """Its replays don't run this code, and a capture takes no events of ours."""
    times, stream.capturing = StepTimes(), True
    with times.part("base", CUDA):
        pass
    assert stream.recorded == 0 and times.totals() == dict.fromkeys(PARTS, (0.0, 0))
