"""A world in which nothing but chance decides."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from flashspec.bandit import DraftSelector
from flashspec.bandit.trace import Decision, play


def play_bernoulli(
    selector: DraftSelector, rates: Sequence[float], n_rounds: int, random: Random, delay: int = 0
) -> list[Decision]:
    """Play arms whose one draft token is accepted with probability `rates[arm]`."""
    return play(selector, lambda arm: Decision(arm, int(random.random() < rates[arm])), n_rounds, delay)
