"""What is known of an arm: counts over a window of its pulls, and whether its rate has moved within them."""

from __future__ import annotations

import operator
from collections import deque
from math import isfinite, log
from numbers import Real
from typing import Any, SupportsIndex

# A stationary arm raises a false alarm about once in 10,000 pulls; a fall from 0.9 to 0.1 is seen after about
# 12 pulls, one from 0.7 to 0.3 after about 30. Swept: blocks of 16..48, thresholds of 5..10.
SHIFT_BLOCK = 32
SHIFT_THRESHOLD = 7.0  # nats


def whole_number(field: str, value: SupportsIndex, least: int = 0) -> int:
    """`value` as an int; ValueError if it is not an integer, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{field} should be an integer >= {least}, got {value!r}")
    return number


def real_number(field: str, value: object, least: float, most: float = float("inf")) -> float:
    """`value` as a float; ValueError if it is a bool, not a finite real, or outside [least, most]."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if isfinite(number) and least <= number <= most:
            return number
    raise ValueError(f"{field} should be a finite number in [{least:g}, {most:g}], got {value!r}")


class ArmStats:
    """Counts of draft tokens over the last `window_size` pulls of one arm (0: over all of them).

    n_pulls, n_accepted and n_drafted belong to the window, so mean_accept_rate == n_accepted / n_drafted;
    lifetime_pulls forgets nothing. A pull that drafted nothing is a pull without evidence about the rate.
    """

    __slots__ = ("_pulls", "_recent", "lifetime_pulls", "n_accepted", "n_drafted", "n_pulls", "window_size")

    def __init__(self, window_size: int = 500) -> None:
        self.window_size = whole_number("window_size", window_size)
        self.n_pulls = self.n_accepted = self.n_drafted = self.lifetime_pulls = 0
        self._pulls: deque[tuple[int, int, int]] = deque()  # (round, accepted, drafted); empty if window_size is 0
        self._recent = 0, 0  # accepted, drafted of the last SHIFT_BLOCK of them

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        """(accepted, drafted) of every pull in the window, oldest first; empty if `window_size` is 0."""
        return tuple((accepted, drafted) for _, accepted, drafted in self._pulls)

    @property
    def mean_accept_rate(self) -> float:
        """Accepted / drafted in the window; 0.0 before any evidence."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    def record(self, accepted: int, drafted: int = 1, *, at: int | None = None) -> None:
        """Add one pull, made in round `at` (default: the next pull of this arm). O(1).

        ValueError unless 0 <= accepted <= drafted, both integers.
        """
        drafted = whole_number("drafted", drafted)
        accepted = whole_number("accepted", accepted)
        if accepted > drafted:
            raise ValueError(f"accepted should be at most drafted = {drafted}, got {accepted}")
        self.lifetime_pulls += 1
        self.n_pulls += 1
        self.n_accepted += accepted
        self.n_drafted += drafted
        if self.window_size:
            self._pulls.append((self.lifetime_pulls if at is None else at, accepted, drafted))
            if self.n_pulls > SHIFT_BLOCK:
                _, left_accepted, left_drafted = self._pulls[-SHIFT_BLOCK - 1]
                accepted, drafted = accepted - left_accepted, drafted - left_drafted
            self._recent = self._recent[0] + accepted, self._recent[1] + drafted
            if self.n_pulls > self.window_size:
                self._forget_oldest()

    def expire(self, oldest: int) -> None:
        """Forget the pulls made before round `oldest`; nothing happens if `window_size` is 0."""
        while self._pulls and self._pulls[0][0] < oldest:
            self._forget_oldest()

    def shift(self) -> int | None:
        """The round where the last SHIFT_BLOCK pulls begin, if their rate is not that of the pulls before.

        A likelihood-ratio test of one rate against two. A pull counts as one observation in [0, 1], however
        many tokens it drafted, because the tokens of a draft stand and fall together. Never fires with fewer
        than 2 SHIFT_BLOCK pulls in the window, nor if `window_size` is 0.
        """
        n_older = self.n_pulls - SHIFT_BLOCK
        if n_older < SHIFT_BLOCK or not self._pulls:
            return None
        accepted, drafted = self._recent
        drafted_before = self.n_drafted - drafted
        if not drafted or not drafted_before:
            return None
        rate, rate_before = accepted / drafted, (self.n_accepted - accepted) / drafted_before
        pooled = self.mean_accept_rate
        evidence = SHIFT_BLOCK * _divergence(rate, pooled) + n_older * _divergence(rate_before, pooled)
        return self._pulls[-SHIFT_BLOCK][0] if evidence > SHIFT_THRESHOLD else None

    def copy(self) -> ArmStats:
        twin = ArmStats(self.window_size)
        twin.n_pulls, twin.lifetime_pulls = self.n_pulls, self.lifetime_pulls
        twin.n_accepted, twin.n_drafted = self.n_accepted, self.n_drafted
        twin._pulls, twin._recent = self._pulls.copy(), self._recent
        return twin

    def state(self) -> dict[str, Any]:
        """Everything but `window_size`, as JSON values."""
        return {
            "lifetime_pulls": self.lifetime_pulls,
            "n_accepted": self.n_accepted,
            "n_drafted": self.n_drafted,
            "pulls": [list(pull) for pull in self._pulls],
        }

    @classmethod
    def from_state(cls, window_size: int, state: dict[str, Any]) -> ArmStats:
        """ValueError where the counts contradict each other."""
        stats = cls(window_size)
        earliest = 1
        for at, accepted, drafted in state["pulls"]:
            stats.record(accepted, drafted, at=whole_number("round", at, earliest))
            earliest = at + 1
        lifetime_pulls = whole_number("lifetime_pulls", state["lifetime_pulls"], stats.n_pulls)
        n_drafted = whole_number("n_drafted", state["n_drafted"])
        n_accepted = whole_number("n_accepted", state["n_accepted"])
        if window_size:
            consistent = (n_accepted, n_drafted) == (stats.n_accepted, stats.n_drafted)
            consistent = consistent and len(state["pulls"]) <= window_size
        else:
            consistent = n_accepted <= n_drafted and not state["pulls"]
            stats.n_pulls, stats.n_accepted, stats.n_drafted = lifetime_pulls, n_accepted, n_drafted
        if not consistent:
            raise ValueError(f"{n_accepted} accepted of {n_drafted} contradicts the window of {window_size} pulls")
        stats.lifetime_pulls = lifetime_pulls
        return stats

    def _forget_oldest(self) -> None:
        _, accepted, drafted = self._pulls.popleft()
        if self.n_pulls <= SHIFT_BLOCK:
            self._recent = self._recent[0] - accepted, self._recent[1] - drafted
        self.n_pulls -= 1
        self.n_accepted -= accepted
        self.n_drafted -= drafted


def _divergence(p: float, q: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli rates, in nats; q is 0 or 1 only where p is."""
    nats = 0.0
    if p > 0.0:
        nats += p * log(p / q)
    if p < 1.0:
        nats += (1.0 - p) * log((1.0 - p) / (1.0 - q))
    return nats
