"""Our own policy: the arm with the most tokens per second, as far as it is known by now."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, compress, groupby
from math import inf, sqrt
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashspec.bandit.base import DraftSelector, Feedback
from flashspec.bandit.estimates import real_number, whole_number

PRIOR_STEP = 0.7  # before evidence, a draft that survived k tokens survives the next with this chance
MEMORY = 100  # steps of a drafter after which its evidence weighs 1/e: a text can turn from prose into a list
IDLE_FADE = 0.999  # a step that brings no evidence: with 0.99 a quarter of all steps went to arms known to be bad
# What drafts may cost where they do not pay, as far as their time counts: this share of it, so many plain steps, and
# what they gained before, up to so many. In a new batch as large a share of the one before, up to so many steps.
LOSS, ALLOWANCE, LEAD, FRESH = 0.01, 4.0, 20.0, 1.0
LEAST_SECONDS = 1e-9  # no step is free: a cost of 0 would divide by 0

FloatArray = NDArray[np.float64]


class Survival:
    """How far drafts get: of tried[k] drafts of more than k tokens, kept[k] had more than k accepted, a drafter each.

    A draft of 8 counts for every shorter length too, so all arms of a drafter learn from each of its steps. The rows of
    a batch are counted apart: they differ, and a batch takes as long as those that it has to wait for.

    moments: of each arm, the accepted tokens that are expected, and how far off that may be.
    """

    def __init__(self, arms: Sequence[tuple[str, int]], fade: float) -> None:
        """fade: of a drafter's evidence in a step of its own."""
        self._arms = arms
        self._fade = fade
        longest = {drafter: max(n for d, n in arms if d == drafter) for drafter, length in arms if length}
        ends = dict(zip(longest, accumulate(longest.values()), strict=True))
        self._columns = {drafter: slice(ends[drafter] - length, ends[drafter]) for drafter, length in longest.items()}
        self._lengths = {drafter: {n for d, n in arms if d == drafter} for drafter in longest}
        self._factors: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}
        self._depths = np.arange(max(longest.values(), default=0))
        self._start(np.zeros((2, sum(longest.values()))), 1)

    def _start(self, totals: FloatArray, rows: int) -> None:
        """totals: tried and kept, (2, columns), of earlier batches."""
        self._counts = np.zeros((1 + rows, *totals.shape))  # of earlier batches, and of each row
        self._counts[0] = totals
        self._weights = np.ones(1 + rows)  # 1 of earlier batches, 1 or 0 of each row
        self._estimate()

    @property
    def _totals(self) -> FloatArray:
        totals: FloatArray = self._weights.dot(self._counts.reshape(len(self._weights), -1))
        return totals.reshape(2, -1)

    @property
    def drafters(self) -> Collection[str]:
        return self._columns.keys()

    def begin(self, rows: int) -> None:
        """What earlier batches said weighs as much as MEMORY rows at the most."""
        totals = self._totals
        self._start(totals * np.minimum(1.0, MEMORY / np.maximum(totals[0], 1.0)), rows)

    def learn(self, arm: int, accepted: Sequence[Sequence[int]], critical: Sequence[bool] | None) -> None:
        """Steps of an arm, one after the other. accepted: of every row in each of them. critical: which rows count from
        now on; None: those that did."""
        length, steps = self._arms[arm][1], len(accepted)
        if critical is not None:
            if len(critical) != len(self._weights) - 1:
                self.begin(len(critical))
            self._weights[1:] = critical
        factors, weights = self._faded(arm, steps)
        self._counts *= factors
        if length:
            survived = np.array(accepted)[:, :, None] > self._depths[:length]  # (steps, rows, length)
            tried, kept = self._counts[1:, :, self._place(arm)].transpose(1, 0, 2)
            tried += weights[-1]
            kept += weights[:-1].dot(survived.reshape(steps, -1)).reshape(-1, length)
        self._estimate()

    def _place(self, arm: int) -> slice:
        """The columns that a draft of an arm reaches; of plain decoding none."""
        drafter, length = self._arms[arm]
        first = self._columns[drafter].start if length else 0
        return slice(first, first + length)

    def _faded(self, arm: int, steps: int) -> tuple[FloatArray, FloatArray]:
        """What so many steps of an arm leave of earlier evidence: as deep as its drafts go; further down, and of other
        drafters, as much as where nothing is played. And what each of the steps weighs by then, and their sum."""
        if (arm, steps) not in self._factors:
            factors = np.full(self._counts.shape[2], IDLE_FADE**steps)
            factors[self._place(arm)] = self._fade**steps
            weights = [self._fade**age for age in reversed(range(steps))]
            self._factors[arm, steps] = factors, np.array([*weights, sum(weights)])
        return self._factors[arm, steps]

    def _estimate(self) -> None:
        tried, kept = self._totals.tolist()
        found = {d: _moments(tried[at], kept[at], self._lengths[d]) for d, at in self._columns.items()}
        self.moments = [found[drafter][length] if length else (0.0, 0.0) for drafter, length in self._arms]

    def state(self) -> dict[str, dict[str, list[float]]]:
        """As JSON values; the rows are told apart no more."""
        tried, kept = self._totals.tolist()
        return {drafter: {"tried": tried[place], "kept": kept[place]} for drafter, place in self._columns.items()}

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        """ValueError, TypeError or LookupError where the counts contradict each other."""
        totals = np.zeros(self._counts.shape[1:])
        for drafter, place in self._columns.items():
            counts = [[real_number(name, n, 0.0) for n in state[drafter][name]] for name in ("tried", "kept")]
            totals[:, place] = counts
            if len(counts[0]) != place.stop - place.start or (totals[1] > totals[0]).any():
                raise ValueError(f"{drafter} has as many counts as its longest draft, none kept that was not tried")
        self._start(totals, 1)


def _accepted(step: Feedback) -> list[int]:
    """Of each row."""
    return [step.accepted] if step.rows is None else [accepted for _, accepted in step.rows]


def _waited_for(step: Feedback, accepted: list[int]) -> float:
    """The average over the rows that the batch waits for. accepted: of each row."""
    if step.rows is not None and step.critical is not None:
        accepted = list(compress(accepted, step.critical))
    return sum(accepted) / max(len(accepted), 1)


def _kind(step: Feedback) -> tuple[int, int]:
    """Its arm and the number of rows; steps of one kind are learned together."""
    return step.arm, 1 if step.rows is None else len(step.rows)


def _moments(tried: Sequence[float], kept: Sequence[float], lengths: Collection[int]) -> dict[int, tuple[float, float]]:
    """Of drafts of so many tokens."""
    found = {}
    chance, mean, square = 1.0, 0.0, 0.0
    for length, (n_tried, n_kept) in enumerate(zip(tried, kept, strict=True), 1):
        share = (n_kept + PRIOR_STEP * chance) / (n_tried + 1)
        if share < chance:
            chance = share
        mean += chance
        square += (2 * length - 1) * chance
        if length in lengths:
            found[length] = mean, sqrt(max(square - mean * mean, 0.1) / (n_tried + 1))
    return found


class Costs:
    """Seconds of each arm's steps: a faded mean, with a guess as one step that never fades. A slow step counts at most
    twice the mean, and what is known is forgotten while an arm is not played: a slow first step must not stand.

    guesses: where steps turn out to be quicker, the guesses of all arms are too slow by as much. A busy machine when
    they are measured would otherwise leave one arm the quickest for ever.
    own: of the steps that an arm took itself. means: with what it lost in others, spread over these.
    """

    def __init__(self, guesses: Sequence[float]) -> None:
        self._guesses = guesses
        self.totals, self.lost, self.weights = ([0.0] * len(guesses) for _ in range(3))
        self._estimate()

    def learn(self, arm: int, seconds: Sequence[float | None], fade: float) -> float:
        """Steps of an arm, one after the other; None where one says nothing of the time. fade: of what is known of that
        arm. Returns what of the time counts."""
        least = min(self.own[:arm] + self.own[arm + 1 :], default=0.0)  # a guess may be far too low
        mean, guess = self.own[arm], self._guesses[arm] * self._scale
        total, lost, weight, counted = self.totals[arm], self.lost[arm], self.weights[arm], 0.0
        idle = IDLE_FADE ** len(seconds)
        self.totals = [total * idle for total in self.totals]
        self.lost = [lost * idle for lost in self.lost]
        self.weights = [weight * idle for weight in self.weights]
        for second in seconds:
            kept = IDLE_FADE if second is None else fade
            total, lost, weight = total * kept, lost * kept, weight * kept
            if second is not None:
                second = max(min(second, 2 * max(mean, least)), LEAST_SECONDS)
                total, weight = total + second, weight + 1
            mean = (guess + total) / (1 + weight)
            counted += mean if second is None else second
        self.totals[arm], self.lost[arm], self.weights[arm] = total, lost, weight
        self._estimate()
        return counted

    def charge(self, arm: int, seconds: float) -> float:
        """An arm lost time in a step that others took; returns what of it counts."""
        seconds = min(seconds, self.own[arm])
        self.lost[arm] += seconds
        self._estimate()
        return seconds

    def _estimate(self) -> None:
        guessed = sum(weight * guess for weight, guess in zip(self.weights, self._guesses, strict=True))
        self._scale = min(1.0, sum(self.totals) / guessed) if guessed else 1.0
        known = zip(self._guesses, self.totals, self.weights, strict=True)
        self.own = [(guess * self._scale + total) / (1 + weight) for guess, total, weight in known]
        means = zip(self.own, self.lost, self.weights, strict=True)
        self.means = [own + lost / (1 + weight) for own, lost, weight in means]

    def state(self) -> dict[str, list[float]]:
        """As JSON values."""
        return {"totals": self.totals, "lost": self.lost, "weights": self.weights}

    def restore(self, state: dict[str, list[Any]]) -> None:
        """ValueError, TypeError or LookupError where it is not of these arms."""
        found = [[real_number(name, n, 0.0) for n in state[name]] for name in self.state()]
        if {*map(len, found)} != {len(self._guesses)}:
            raise ValueError(f"costs describe {[*map(len, found)]} arms, there are {len(self._guesses)}")
        self.totals, self.lost, self.weights = found
        self._estimate()


class AutoSelector(DraftSelector):
    """Thompson sampling of tokens per step over measured seconds per step.

    arms: (drafter, length), length 0 being plain decoding, which emits exactly one token. seconds: a guess of each
    arm's step; low guesses make an arm tried early. `update` needs `seconds` to learn costs. Evidence fades, slowly
    while others are played, so that an arm that was bad long ago is tried again.

    Where drafts have cost more than LOSS, ALLOWANCE and LEAD allow, over what plain decoding would have taken for the
    same tokens, they wait until plain steps have made up for it, or for a new batch, whose text may be of another kind:
    FRESH. So does a draft that would cost more than is left, should nothing of it be kept.

    An arm that gives way has its rate from the steps that it takes, and the time that it lost in others: it goes first
    where what it has to say is worth more than other arms on average, and those come into their own where it is silent.
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
        self._fade = 1 - 1 / min(MEMORY, window_size or MEMORY)
        self._start_over()

    def _start_over(self) -> None:
        self._random = Random(self._seed)
        self._survival = Survival(self._arms, self._fade)
        self._costs = Costs([max(guess, LEAST_SECONDS) for guess in self._guesses])
        self._plain = next((arm for arm, (_, length) in enumerate(self._arms) if not length), None)
        self._heard: list[Feedback] = []  # nothing concluded from it yet
        self._lead = 0.0  # seconds gained over plain decoding, with the share that may be lost
        self._begun = 0  # the round before this batch

    def expected_rates(self) -> list[float]:
        """Each arm's estimated tokens per second, exploration aside."""
        with self._lock:
            return self._rates()

    def _rates(self) -> list[float]:
        self._conclude()
        return [(1 + mean) / cost for (mean, _), cost in zip(self._survival.moments, self._costs.means, strict=True)]

    def rival(self, arm: int) -> float:
        with self._lock:
            rates = self._rates()
            others = [other for other in self._enabled if self._arms[other][0] != self._arms[arm][0]]
            return max([1.0, *(rates[other] * self._costs.own[arm] for other in others)])

    def _choose(self, arms: Sequence[int]) -> int:
        self._conclude()
        # The lengths of a drafter share their evidence.
        luck = {drafter: self._random.gauss(0.0, 1.0) for drafter in self._survival.drafters}

        def sampled_rate(arm: int) -> float:
            drafter, length = self._arms[arm]
            mean, deviation = self._survival.moments[arm]
            accepted = mean + luck.get(drafter, 0.0) * deviation
            return (1 + min(length, max(0.0, accepted))) / self._costs.means[arm]

        arm, plain, seconds = max(arms, key=sampled_rate), self._plain, self._costs.means
        if plain is None or plain not in arms:
            return arm
        least = seconds[arm] - (1 + ALLOWANCE) * seconds[plain]  # the lead that covers a draft of which nothing is kept
        return plain if self._lead < min(0.0, least) else arm

    def _begin(self, rows: int) -> None:
        self._conclude()
        self._survival.begin(rows)
        if self._plain is not None:
            fresh = min(LOSS * (self._t - self._begun), FRESH)
            self._lead = max(self._lead, (fresh - ALLOWANCE) * self._costs.means[self._plain])
        self._begun = self._t

    def _charge(self, arm: int, seconds: float) -> None:
        self._conclude()
        self._lead -= self._costs.charge(arm, seconds)

    def _learn(self, step: Feedback) -> None:
        self._heard.append(step)
        if not step.more:
            self._conclude()

    def _conclude(self) -> None:
        """From what was heard; steps of one arm in a row are worked out at once."""
        heard, self._heard = self._heard, []
        for (arm, rows), group in groupby(heard, _kind):
            steps, critical = list(group), None
            everyone = [True] * rows if self._arms[arm][1] else None
            for step in steps:
                critical = step.critical or everyone or critical
            accepted = [_accepted(step) for step in steps]
            self._survival.learn(arm, accepted, critical)
            seconds = self._costs.learn(arm, [step.seconds for step in steps], self._fade)
            self._move_lead(arm, len(steps), sum(map(_waited_for, steps, accepted)), seconds)

    def _move_lead(self, arm: int, steps: int, accepted: float, seconds: float) -> None:
        """By what steps gained over plain decoding. accepted: what was waited for, of all of them together."""
        if self._plain is None or self._plain not in self._enabled:
            return
        plain = self._costs.means[self._plain]
        gained = plain * (steps + accepted) - seconds if self._arms[arm][1] else 0.0
        self._lead = min(self._lead + gained + LOSS * plain * steps, LEAD * plain)

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
        self._conclude()
        return super()._state() | {
            "random": self._random.getstate(),
            "survival": self._survival.state(),
            "costs": self._costs.state(),
            "lead": self._lead,
            "begun": self._begun,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        version, words, gauss = state["random"]
        gauss = None if gauss is None else real_number("random", gauss, -inf)
        self._random.setstate((version, tuple(words), gauss))
        self._survival.restore(state["survival"])
        self._costs.restore(state["costs"])
        self._lead = real_number("lead", state["lead"], -inf)
        self._begun = whole_number("begun", state["begun"])
