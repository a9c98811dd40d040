"""How long things take: percentiles over the latest of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable


class LatencyTracker:
    """Percentiles, in milliseconds, of the last `window` durations; NaN while there are none.

    clock: seconds, never running backwards.
    """

    def __init__(self, window: int = 1000, clock: Callable[[], float] = time.perf_counter) -> None:
        if window < 1:
            raise ValueError(f"window should be at least 1: got {window}")
        self.window = window
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        self._milliseconds: deque[float] = deque(maxlen=self.window)
        self._started: float | None = None

    def start(self) -> None:
        """Begins a duration, and forgets one that was begun and not stopped."""
        self._started = self._clock()

    def stop(self) -> float:
        """Ends the duration that `start` began and returns it in milliseconds; RuntimeError without one."""
        if self._started is None:
            raise RuntimeError("LatencyTracker.stop was called without start")
        self.record(self._clock() - self._started)
        self._started = None
        return self._milliseconds[-1]

    def record(self, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds should be finite and not negative: got {seconds}")
        self._milliseconds.append(seconds * 1000)

    @property
    def count(self) -> int:
        """Durations in the window."""
        return len(self._milliseconds)

    @property
    def p50(self) -> float:
        return self._percentile(0.50)

    @property
    def p95(self) -> float:
        return self._percentile(0.95)

    @property
    def p99(self) -> float:
        return self._percentile(0.99)

    def _percentile(self, share: float) -> float:
        """Linear between the two nearest ranks, as numpy does it."""
        if not self.count:
            return math.nan
        ordered = sorted(self._milliseconds)
        rank = share * (self.count - 1)
        below = int(rank)
        above = min(below + 1, self.count - 1)
        return ordered[below] + (rank - below) * (ordered[above] - ordered[below])
