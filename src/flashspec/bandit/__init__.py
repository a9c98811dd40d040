"""Which arm next? Host code only: no torch below this line."""

from __future__ import annotations

from collections.abc import Sequence

from flashspec.bandit.auto import AutoSelector
from flashspec.bandit.base import DraftSelector
from flashspec.bandit.estimates import ArmStats
from flashspec.bandit.fixed import FixedSelector
from flashspec.bandit.oracle import OracleSelector
from flashspec.bandit.thompson import ThompsonSelector
from flashspec.bandit.ucb import UCB1Selector

__all__ = [
    "ArmStats",
    "AutoSelector",
    "DraftSelector",
    "FixedSelector",
    "OracleSelector",
    "ThompsonSelector",
    "UCB1Selector",
    "make_selector",
]


def make_selector(
    strategy: str,
    n_arms: int,
    *,
    window_size: int = 500,
    exploration_constant: float = 1.0,
    prior_alpha: float = 1.0,
    prior_beta: float = 1.0,
    true_rates: Sequence[float] | None = None,
    seed: int | None = None,
    arms: Sequence[tuple[str, int]] | None = None,
    seconds: Sequence[float] | None = None,
) -> DraftSelector:
    """The policy named 'auto' (needs `arms` and `seconds`), 'ucb1', 'thompson', 'oracle' (needs `true_rates`) or
    'fixed' (plays arm 0). A policy takes the options it knows and ignores the rest.
    """
    if strategy == "auto":
        if arms is None or seconds is None:
            raise ValueError("strategy 'auto' needs arms, (drafter, length) each, and a guess of their seconds")
        return AutoSelector(n_arms, arms, seconds, window_size, seed)
    if strategy == "ucb1":
        return UCB1Selector(n_arms, window_size, exploration_constant)
    if strategy == "thompson":
        return ThompsonSelector(n_arms, window_size, prior_alpha, prior_beta, seed)
    if strategy == "oracle":
        if true_rates is None:
            raise ValueError("strategy 'oracle' needs true_rates, one for each arm")
        return OracleSelector(n_arms, true_rates, window_size)
    if strategy == "fixed":
        return FixedSelector(n_arms, 0, window_size)
    raise ValueError(f"strategy should be 'auto', 'ucb1', 'thompson', 'oracle' or 'fixed', got {strategy!r}")
