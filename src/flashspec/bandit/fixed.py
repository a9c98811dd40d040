"""No choice at all: one arm, always."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashspec.bandit.base import DraftSelector


class FixedSelector(DraftSelector):
    """Plays `arm`; while that is disabled, the first arm that is not."""

    def __init__(self, n_arms: int, arm: int, window_size: int = 500) -> None:
        super().__init__(n_arms, window_size)
        self._arm = self._known(arm)

    def _choose(self, arms: Sequence[int]) -> int:
        return self._arm if self._arm in arms else arms[0]

    def _options(self) -> dict[str, Any]:
        return {"n_arms": self._n_arms, "arm": self._arm, "window_size": self._window_size}
