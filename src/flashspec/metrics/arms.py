"""What each arm did to a text: the one table behind the terminal, the JSON documents and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashspec.core import StepRecord


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """share: of all steps. drafted, accepted, emitted: tokens over all rows. seconds: of this arm's steps."""

    arm: str
    steps: int
    share: float
    drafted: int
    accepted: int
    emitted: int
    seconds: float

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.emitted / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        rates = {"acceptance_rate": self.acceptance_rate, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | rates


def summarise_arms(steps: Iterable[StepRecord]) -> list[ArmSummary]:
    """One summary for each arm that was played, the most played first."""
    by_arm: dict[str, list[StepRecord]] = {}
    for step in steps:
        by_arm.setdefault(str(step.arm), []).append(step)
    total = sum(map(len, by_arm.values()))
    summaries = [
        ArmSummary(
            arm=arm,
            steps=len(played),
            share=len(played) / total,
            drafted=sum(step.drafted for step in played),
            accepted=sum(step.accepted for step in played),
            emitted=sum(step.emitted for step in played),
            seconds=sum(step.seconds for step in played),
        )
        for arm, played in by_arm.items()
    ]
    return sorted(summaries, key=lambda summary: -summary.steps)
