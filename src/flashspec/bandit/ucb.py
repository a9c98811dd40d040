"""UCB1 (Auer, Cesa-Bianchi, Fischer 2002), over a window as in Garivier and Moulines 2011."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, sqrt
from typing import Any

from flashspec.bandit.base import DraftSelector
from flashspec.bandit.estimates import real_number


class UCB1Selector(DraftSelector):
    """Plays the arm with the largest mean + c sqrt(2 ln t / n), every arm once first.

    n and t count pulls and rounds within the window. A selection whose feedback is still to come counts as a
    pull, so that the first pulls go to different arms even if no answer has arrived.
    """

    def __init__(self, n_arms: int, window_size: int = 500, exploration_constant: float = 1.0) -> None:
        super().__init__(n_arms, window_size)
        self._exploration_constant = real_number("exploration_constant", exploration_constant, 0.0)

    def _choose(self, arms: Sequence[int]) -> int:
        rounds = self._rounds_in_window + len(self._pending)
        spread = self._exploration_constant * sqrt(2.0 * log(rounds)) if rounds else 0.0
        best, best_index = arms[0], -inf
        for arm in arms:
            stats = self._stats[arm]
            n = stats.n_pulls + self._outstanding[arm]
            if n == 0:
                return arm
            index = stats.mean_accept_rate + spread / sqrt(n)
            if index > best_index:
                best, best_index = arm, index
        return best

    def _options(self) -> dict[str, Any]:
        return {
            "n_arms": self._n_arms,
            "window_size": self._window_size,
            "exploration_constant": self._exploration_constant,
        }
