"""Thompson sampling with a Beta posterior over the accept rate of a draft token."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, log, sin, sqrt, tau
from random import Random
from typing import Any

from flashspec.bandit.base import DraftSelector
from flashspec.bandit.estimates import real_number, whole_number


class ThompsonSelector(DraftSelector):
    """Plays the arm whose sampled rate is largest, Beta(prior_alpha + accepted, prior_beta + rejected).

    The generator is its own: equal seeds and equal feedback give equal choices; without a seed every run differs.
    """

    def __init__(
        self,
        n_arms: int,
        window_size: int = 500,
        prior_alpha: float = 1.0,
        prior_beta: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(n_arms, window_size)
        self._prior_alpha = _positive("prior_alpha", prior_alpha)
        self._prior_beta = _positive("prior_beta", prior_beta)
        self._seed = None if seed is None else whole_number("seed", seed)
        self._random = Random(self._seed)

    def _choose(self, arms: Sequence[int]) -> int:
        best, best_rate = arms[0], -1.0
        for arm in arms:
            stats = self._stats[arm]
            alpha = self._prior_alpha + stats.n_accepted
            beta = self._prior_beta + (stats.n_drafted - stats.n_accepted)
            rate = sample_beta(self._random, alpha, beta)
            if rate > best_rate:
                best, best_rate = arm, rate
        return best

    def _reset(self) -> None:
        super()._reset()
        self._random = Random(self._seed)

    def _options(self) -> dict[str, Any]:
        return {
            "n_arms": self._n_arms,
            "window_size": self._window_size,
            "prior_alpha": self._prior_alpha,
            "prior_beta": self._prior_beta,
            "seed": self._seed,
        }

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"random": self._random.getstate()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))


def sample_beta(random: Random, alpha: float, beta: float) -> float:
    """One draw from Beta(alpha, beta), both > 0.

    G / (G + H) of two Gamma variates by Marsaglia and Tsang's method (2000), the normals from one Box-Muller
    pair and the two acceptance tests merged into one: 1 us, where random.betavariate takes 2 and thirty arms
    have 50.
    """
    if alpha < 1.0 or beta < 1.0:
        return random.betavariate(alpha, beta)
    uniform = random.random
    d, e = alpha - 1.0 / 3.0, beta - 1.0 / 3.0
    while True:
        square = -2.0 * log(1.0 - uniform())  # x² + y² of the two normals
        radius, angle = sqrt(square), tau * uniform()
        v = 1.0 + radius * cos(angle) / sqrt(9.0 * d)
        w = 1.0 + radius * sin(angle) / sqrt(9.0 * e)
        if v <= 0.0 or w <= 0.0:
            continue
        v, w = v * v * v, w * w * w
        u = 1.0 - uniform()
        # The paper's squeezes, 1 - 0.0331 x⁴ and 1 - 0.0331 y⁴, multiply to more than this and save the logs.
        accepted = u < 1.0 - 0.0331 * square * square
        if accepted or log(u) < 0.5 * square + d * (1.0 - v + log(v)) + e * (1.0 - w + log(w)):
            return d * v / (d * v + e * w)


def _positive(field: str, value: float) -> float:
    number = real_number(field, value, 0.0)
    if number == 0.0:
        raise ValueError(f"{field} should be above 0, got {value!r}")
    return number
