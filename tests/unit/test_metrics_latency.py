import math
import random
from itertools import count

import numpy as np
import pytest

from flashspec.metrics import LatencyTracker


def test_start_and_stop_measure_with_the_clock_in_milliseconds() -> None:
    ticks = iter([10.0, 10.5, 20.0, 30.0, 30.25])
    tracker = LatencyTracker(clock=lambda: next(ticks))
    tracker.start()
    assert tracker.stop() == 500
    tracker.start()
    tracker.start()
    assert tracker.stop() == 250
    assert (tracker.count, tracker.p50) == (2, 375)


def test_percentiles_are_numpys() -> None:
    generator = random.Random(0)
    seconds = [generator.expovariate(20) for _ in range(137)]
    tracker = LatencyTracker()
    for value in seconds:
        tracker.record(value)
    expected = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
    assert [tracker.p50, tracker.p95, tracker.p99] == pytest.approx(expected.tolist())


def test_the_window_forgets_the_oldest() -> None:
    tracker = LatencyTracker(window=3)
    for seconds in (9, 1, 2, 3):
        tracker.record(seconds)
    assert (tracker.count, tracker.p50) == (3, 2000)


def test_one_duration_is_every_percentile() -> None:
    tracker = LatencyTracker()
    tracker.record(0.004)
    assert tracker.p50 == tracker.p95 == tracker.p99 == 4


def test_empty_and_reset() -> None:
    tracker = LatencyTracker(clock=map(float, count()).__next__)
    tracker.record(1)
    tracker.start()
    tracker.reset()
    assert tracker.count == 0
    assert all(math.isnan(value) for value in (tracker.p50, tracker.p95, tracker.p99))
    with pytest.raises(RuntimeError, match="stop was called without start"):
        tracker.stop()


def test_stop_needs_a_start_of_its_own() -> None:
    tracker = LatencyTracker()
    tracker.start()
    tracker.stop()
    with pytest.raises(RuntimeError, match="stop was called without start"):
        tracker.stop()


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf])
def test_impossible_durations_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds should be finite and not negative"):
        LatencyTracker().record(seconds)


def test_the_window_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="window should be at least 1: got 0"):
        LatencyTracker(window=0)
