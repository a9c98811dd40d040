"""Our own policy: the arm with the most tokens per second, as far as it is known by now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from random import Random
from typing import Any

from flashspec.bandit.base import DraftSelector, Rows
from flashspec.bandit.estimates import real_number, whole_number

PRIOR_STEP = 0.7  # before evidence, a draft that survived k tokens survives the next with this chance
MEMORY = 100  # steps of a drafter after which its evidence weighs 1/e: a text can turn from prose into a list
IDLE_FADE = 0.999  # a step that brings no evidence: with 0.99 a quarter of all steps went to arms known to be bad
LEAST_SECONDS = 1e-9  # no step is free: a cost of 0 would divide by 0


@dataclass(slots=True)
class Survival:
    """How far one drafter's drafts get: kept[k] of tried[k] drafts of more than k tokens had more than k accepted.

    Both are as long as its longest draft. A draft of 8 counts for every shorter length too, so all arms of a drafter
    learn from each of its steps.
    """

    tried: list[float]
    kept: list[float]

    @classmethod
    def restored(cls, state: dict[str, Any], longest: int) -> Survival:
        """ValueError where the counts contradict each other."""
        tried, kept = ([real_number(name, count, 0.0) for count in state[name]] for name in ("tried", "kept"))
        if not len(tried) == len(kept) == longest or any(k > t for t, k in zip(tried, kept, strict=True)):
            raise ValueError(f"kept {kept} of {tried} tried drafts contradicts {longest} draft tokens")
        return cls(tried, kept)

    def record(self, length: int, accepted: int) -> None:
        for k in range(length):
            self.tried[k] += 1
            self.kept[k] += accepted > k

    def fade(self, factor: float, length: int) -> None:
        """By the factor as deep as a draft of `length` went, further down by as little as if others had been played."""
        factors = [factor if k < length else IDLE_FADE for k in range(len(self.tried))]
        self.tried = [count * by for count, by in zip(self.tried, factors, strict=True)]
        self.kept = [count * by for count, by in zip(self.kept, factors, strict=True)]

    def moments(self, lengths: Collection[int]) -> dict[int, tuple[float, float]]:
        """For each draft length: the expected number of accepted tokens, and the variance of that expectation."""
        results = {}
        chance, mean, square = 1.0, 0.0, 0.0
        for length, (tried, kept) in enumerate(zip(self.tried, self.kept, strict=True), 1):
            chance = min(chance, (kept + PRIOR_STEP * chance) / (tried + 1))
            mean += chance
            square += (2 * length - 1) * chance
            if length in lengths:
                results[length] = mean, max(square - mean * mean, 0.1) / (tried + 1)
        return results


@dataclass(slots=True)
class Cost:
    """Seconds of an arm's steps: a faded mean, with the guess as one step that never fades. A slow step counts at most
    twice the mean, and what is known is forgotten while the arm is not played: a slow first step must not stand."""

    guess: float
    total: float = 0.0
    weight: float = 0.0

    @property
    def mean(self) -> float:
        return (self.guess + self.total) / (1 + self.weight)

    def fade(self, factor: float) -> None:
        self.total *= factor
        self.weight *= factor

    def record(self, seconds: float) -> None:
        self.total += max(min(seconds, 2 * self.mean), LEAST_SECONDS)
        self.weight += 1


class AutoSelector(DraftSelector):
    """Thompson sampling of tokens per step over measured seconds per step.

    arms: (drafter, length), length 0 being plain decoding, which emits exactly one token. seconds: a guess of each
    arm's step; low guesses make an arm tried early. `update` needs `seconds` to learn costs. Evidence fades, slowly
    while others are played, so that an arm that was bad long ago is tried again.

    An arm that gives way is to hear what came of the step all the same: so its rate is that of trying it first.
    """

    gives_way = True

    def __init__(
        self,
        n_arms: int,
        arms: Sequence[tuple[str, int]],
        seconds: Sequence[float],
        window_size: int = 500,
        seed: int | None = None,
    ) -> None:
        super().__init__(n_arms, window_size)
        if len(arms) != n_arms or len(seconds) != n_arms:
            raise ValueError(
                f"n_arms is {n_arms}: arms and seconds should name {n_arms} arms, got {len(arms)} and {len(seconds)}"
            )
        self._arms = [(str(drafter), whole_number("length", length)) for drafter, length in arms]
        self._guesses = [real_number("seconds", value, 0.0) for value in seconds]
        self._seed = seed
        self._start_over()

    def _start_over(self) -> None:
        self._random = Random(self._seed)
        drafters = dict.fromkeys(drafter for drafter, length in self._arms if length)
        self._lengths = {drafter: frozenset(n for d, n in self._arms if d == drafter and n) for drafter in drafters}
        longest = {drafter: max(lengths) for drafter, lengths in self._lengths.items()}
        self._survival = {drafter: Survival([0.0] * n, [0.0] * n) for drafter, n in longest.items()}
        self._costs = [Cost(max(guess, LEAST_SECONDS)) for guess in self._guesses]
        self._estimate()

    def _estimate(self) -> None:
        """Accepted tokens of each arm, mean and deviation; here and not in `_choose`, whose 50 us they would take."""
        moments = {drafter: self._survival[drafter].moments(n) for drafter, n in self._lengths.items()}
        pairs = [moments[drafter][length] if length else (0.0, 0.0) for drafter, length in self._arms]
        self._accepted = [(mean, sqrt(variance)) for mean, variance in pairs]

    def expected_rates(self) -> list[float]:
        """Each arm's estimated tokens per second, exploration aside."""
        with self._lock:
            return self._rates()

    def _rates(self) -> list[float]:
        return [(1 + mean) / cost.mean for (mean, _), cost in zip(self._accepted, self._costs, strict=True)]

    def rival(self, arm: int) -> float:
        with self._lock:
            # Plain decoding may go untried for long, so a slow step of it could stand for ever; no arm is cheaper.
            plain = min(cost.mean for cost in self._costs)
            others = [
                rate * plain
                for other, rate in enumerate(self._rates())
                if other in self._enabled and self._arms[other][0] != self._arms[arm][0]
            ]
            return max([1.0, *others])

    def _choose(self, arms: Sequence[int]) -> int:
        luck = {drafter: self._random.gauss(0.0, 1.0) for drafter in self._lengths}  # its lengths share their evidence

        def sampled_rate(arm: int) -> float:
            drafter, length = self._arms[arm]
            mean, deviation = self._accepted[arm]
            accepted = mean + luck.get(drafter, 0.0) * deviation
            return (1 + min(length, max(0.0, accepted))) / self._costs[arm].mean

        return max(arms, key=sampled_rate)

    def _learn(self, arm: int, accepted: int, drafted: int, rows: Rows | None, seconds: float | None) -> None:
        fade = 1 - 1 / min(MEMORY, self._window_size or MEMORY)
        drafter, length = self._arms[arm]
        for other, survival in self._survival.items():
            survival.fade(fade, length if other == drafter else 0)
        if length:
            for _, row_accepted in rows if rows is not None else ((drafted, accepted),):
                self._survival[drafter].record(length, row_accepted)
        for cost in self._costs:
            cost.fade(fade if cost is self._costs[arm] and seconds is not None else IDLE_FADE)
        if seconds is not None:
            self._costs[arm].record(seconds)
        self._estimate()

    def _reset(self) -> None:
        super()._reset()
        self._start_over()

    def _options(self) -> dict[str, Any]:
        return {
            "n_arms": self._n_arms,
            "arms": self._arms,
            "seconds": self._guesses,
            "window_size": self._window_size,
            "seed": self._seed,
        }

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "random": self._random.getstate(),
            "survival": {drafter: asdict(survival) for drafter, survival in self._survival.items()},
            "costs": [{"total": cost.total, "weight": cost.weight} for cost in self._costs],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        self._survival = {
            drafter: Survival.restored(state["survival"][drafter], max(lengths))
            for drafter, lengths in self._lengths.items()
        }
        if len(state["costs"]) != self._n_arms:
            raise ValueError(f"costs describe {len(state['costs'])} arms, n_arms is {self._n_arms}")
        for cost, stored in zip(self._costs, state["costs"], strict=True):
            cost.total, cost.weight = (real_number(name, stored[name], 0.0) for name in ("total", "weight"))
        self._estimate()
