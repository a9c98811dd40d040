"""How much of the drafts is accepted."""

from __future__ import annotations


class AcceptanceTracker:
    """Counts drafted and accepted tokens, one row of one step a record. Rates are 0.0 without drafts."""

    def __init__(self, gamma: int) -> None:
        if gamma < 1:
            raise ValueError(f"gamma should be at least 1: got {gamma}")
        self.gamma = gamma
        self.reset()

    def reset(self) -> None:
        self.n_steps = 0
        self._drafted = [0] * self.gamma  # steps that drafted a token at this position
        self._accepted = [0] * self.gamma  # ... and accepted it

    def record(self, accepted: int, drafted: int | None = None) -> None:
        """A step that drafted so many tokens (None: gamma) and accepted the first so many of them."""
        drafted = self.gamma if drafted is None else drafted
        if not 0 <= drafted <= self.gamma:
            raise ValueError(f"drafted should be in 0..{self.gamma}: got {drafted}")
        if not 0 <= accepted <= drafted:
            raise ValueError(f"accepted should be in 0..{drafted}, the number drafted: got {accepted}")
        self.n_steps += 1
        for position in range(drafted):
            self._drafted[position] += 1
            self._accepted[position] += position < accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        drafted = sum(self._drafted)
        return sum(self._accepted) / drafted if drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted a step: 1 + accepted per step; 0.0 before the first step."""
        return 1 + sum(self._accepted) / self.n_steps if self.n_steps else 0.0

    @property
    def per_position(self) -> list[float]:
        """For each of gamma positions, the share of the tokens drafted there that was accepted."""
        pairs = zip(self._accepted, self._drafted, strict=True)
        return [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]
