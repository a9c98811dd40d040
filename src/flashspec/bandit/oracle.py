"""The policy that is told the rates: the yardstick of regret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashspec.bandit.base import DraftSelector
from flashspec.bandit.estimates import real_number


class OracleSelector(DraftSelector):
    """Plays the arm with the largest true rate, the first of equals; for measuring regret only."""

    def __init__(self, n_arms: int, true_rates: Sequence[float], window_size: int = 500) -> None:
        super().__init__(n_arms, window_size)
        self._true_rates = self._checked_rates(true_rates)

    def set_true_rates(self, true_rates: Sequence[float]) -> None:
        """ValueError unless there is one rate in [0, 1] an arm."""
        rates = self._checked_rates(true_rates)
        with self._lock:
            self._true_rates = rates

    def _choose(self, arms: Sequence[int]) -> int:
        return max(arms, key=self._true_rates.__getitem__)

    def _options(self) -> dict[str, Any]:
        return {"n_arms": self._n_arms, "true_rates": self._true_rates, "window_size": self._window_size}

    def _checked_rates(self, true_rates: Sequence[float]) -> list[float]:
        rates = [real_number(f"true_rates[{arm}]", rate, 0.0, 1.0) for arm, rate in enumerate(true_rates)]
        if len(rates) != self._n_arms:
            raise ValueError(f"true_rates should have one rate for each of {self._n_arms} arms, got {len(rates)}")
        return rates
