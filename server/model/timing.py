"""Where a step's time goes: base, memory, search, look-ups of n-grams, mixing, drafting (whose own logits count as drafting)."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("base", "memory", "search", "ngram", "mixing", "drafting")


class StepTimes:
    """Seconds and calls of each part since the start, read by the front end when it is scraped.

    On a CPU the clock around a part is its time. On CUDA the calls return before the work is done, so events are put into the
    stream and read when they have passed; nothing waits for them.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls = dict.fromkeys(PARTS, 0)
        self.waiting: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        """Time one part of a step. A part that is captured inside a larger CUDA graph isn't timed: its replays don't run this code."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield
        elif device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.waiting.append((name, begin, end))
            self._read_passed()
        else:
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)

    def totals(self) -> dict[str, tuple[float, int]]:
        """Part -> seconds and calls."""
        self._read_passed()
        return {name: (self.seconds[name], self.calls[name]) for name in PARTS}

    def _read_passed(self) -> None:
        """Add up the events that the stream has passed, at each call, so that few of them wait."""
        while self.waiting and self.waiting[0][2].query():
            name, begin, end = self.waiting.popleft()
            self._add(name, begin.elapsed_time(end) / 1e3)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self.calls[name] += 1
