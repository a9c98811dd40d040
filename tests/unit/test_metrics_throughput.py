import math
import subprocess
import sys

import pytest

from flashspec.metrics import ThroughputTracker


def test_spans_add_up_and_the_time_between_them_does_not_count() -> None:
    ticks = iter([0.0, 2.0, 100.0, 102.0])
    tracker = ThroughputTracker(clock=lambda: next(ticks))
    tracker.start()
    tracker.stop(30)
    tracker.start()
    tracker.stop(10)
    tracker.record(20, 1.0)
    assert (tracker.n_tokens, tracker.seconds, tracker.tokens_per_second) == (60, 5.0, 12.0)


def test_mfu_is_the_share_of_the_peak() -> None:
    tracker = ThroughputTracker(flops_per_token=2e9, peak_flops=1e12)
    tracker.record(100, 2.0)
    assert tracker.mfu == pytest.approx(0.1)


@pytest.mark.parametrize("known", [{}, {"flops_per_token": 1e9}, {"peak_flops": 1e12}])
def test_mfu_is_unknown_without_both_numbers(known: dict[str, float]) -> None:
    assert ThroughputTracker(**known).mfu is None


def test_empty_and_reset() -> None:
    tracker = ThroughputTracker(flops_per_token=1, peak_flops=1)
    tracker.record(5, 1.0)
    tracker.start()
    tracker.reset()
    assert (tracker.n_tokens, tracker.seconds, tracker.tokens_per_second, tracker.mfu) == (0, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="stop was called without start"):
        tracker.stop(1)


@pytest.mark.parametrize(
    ("n_tokens", "seconds", "message"),
    [
        (-1, 1.0, "n_tokens should not be negative: got -1"),
        (1, -1.0, "seconds should be finite and not negative"),
        (1, math.nan, "seconds should be finite and not negative"),
    ],
)
def test_impossible_records_are_refused(n_tokens: int, seconds: float, message: str) -> None:
    tracker = ThroughputTracker()
    with pytest.raises(ValueError, match=message):
        tracker.record(n_tokens, seconds)
    assert (tracker.n_tokens, tracker.seconds) == (0, 0.0)


@pytest.mark.parametrize("name", ["flops_per_token", "peak_flops"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_impossible_hardware_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} should be finite and positive"):
        ThroughputTracker(**{name: value})


def test_metrics_import_no_torch() -> None:
    script = "import sys, importlib.util as u, types; import flashspec.metrics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
