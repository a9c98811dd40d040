"""Tokens per second, and how much of the device's arithmetic that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class ThroughputTracker:
    """Tokens over the time they took; what lies between `stop` and the next `start` does not count.

    flops_per_token: floating-point operations the model spends on a token. peak_flops: the device's limit, a
    second. clock: seconds, never running backwards.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("flops_per_token", flops_per_token), ("peak_flops", peak_flops)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} should be finite and positive: got {value}")
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        self.n_tokens = 0
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begins a span, and forgets one that was begun and not stopped."""
        self._started = self._clock()

    def stop(self, n_tokens: int) -> None:
        """Ends the span that `start` began, in which n_tokens were emitted; RuntimeError without one."""
        if self._started is None:
            raise RuntimeError("ThroughputTracker.stop was called without start")
        self.record(n_tokens, self._clock() - self._started)
        self._started = None

    def record(self, n_tokens: int, seconds: float) -> None:
        if n_tokens < 0:
            raise ValueError(f"n_tokens should not be negative: got {n_tokens}")
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds should be finite and not negative: got {seconds}")
        self.n_tokens += n_tokens
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """0.0 while no time has been recorded."""
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: achieved / peak; None where either is unknown."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.tokens_per_second * self.flops_per_token / self.peak_flops
