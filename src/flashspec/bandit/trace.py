"""Record what was played, replay a selector over it, and count regret."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import log, pi
from typing import TextIO

from flashspec.bandit.base import DraftSelector


@dataclass(frozen=True, slots=True)
class Decision:
    """One round: the arm played and what `DraftSelector.update` was told of it."""

    arm: int
    accepted: int
    drafted: int = 1
    rows: tuple[tuple[int, int], ...] | None = None
    seconds: float | None = None
    critical: tuple[bool, ...] | None = None

    def report_to(self, selector: DraftSelector) -> None:
        selector.update(
            self.arm,
            self.accepted,
            self.drafted,
            rows=self.rows,
            critical=self.critical,
            seconds=self.seconds,
        )


def write_trace(file: TextIO, decisions: Iterable[Decision]) -> None:
    """Append one JSON object a line."""
    for decision in decisions:
        file.write(json.dumps(asdict(decision)) + "\n")


def read_trace(file: TextIO) -> list[Decision]:
    """What `write_trace` wrote; ValueError naming the first line that is not a decision."""
    decisions = []
    for number, line in enumerate(file, start=1):
        try:
            fields = json.loads(line)
            if fields["rows"] is not None:
                fields["rows"] = tuple((drafted, accepted) for drafted, accepted in fields["rows"])
            if fields.get("critical") is not None:
                fields["critical"] = tuple(fields["critical"])
            decisions.append(Decision(**fields))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"line {number} of the trace should be a decision: {error!r}") from error
    return decisions


def play(
    selector: DraftSelector, respond: Callable[[int], Decision | None], n_rounds: int, delay: int = 0
) -> list[Decision]:
    """Play `n_rounds`, or until `respond(arm)` is None; answers reach the selector `delay` selections late.

    Answers still on their way at the end are delivered then.
    """
    decisions: list[Decision] = []
    on_their_way: deque[Decision] = deque()
    for _ in range(n_rounds):
        decision = respond(selector.select())
        if decision is None:
            break
        decisions.append(decision)
        on_their_way.append(decision)
        if len(on_their_way) > delay:
            on_their_way.popleft().report_to(selector)
    for decision in on_their_way:
        decision.report_to(selector)
    return decisions


def replay(selector: DraftSelector, trace: Sequence[Decision], delay: int = 0) -> list[Decision]:
    """What `selector` would have played, answered from a recorded trace.

    The answer to an arm is that arm's earliest recorded round not used yet; the replay ends where there is
    none (queue replay, Mandel et al. 2016). It keeps the order within an arm, not the alignment between arms:
    a trace whose rates drift compares policies only roughly. The policy that wrote the trace, with the same
    seed and delay, repeats it, unless arms gave way: a trace has no word of that.
    """
    answers: list[deque[Decision]] = [deque() for _ in range(selector.n_arms)]
    for decision in trace:
        if not 0 <= decision.arm < selector.n_arms:
            raise ValueError(f"the trace plays arm {decision.arm}, but the selector has {selector.n_arms} arms")
        answers[decision.arm].append(decision)
    return play(selector, lambda arm: answers[arm].popleft() if answers[arm] else None, len(trace), delay)


def cumulative_regret(decisions: Iterable[Decision], rates: Sequence[float]) -> list[float]:
    """After each round, the accepts that always playing the best arm would be expected to have gained."""
    best = max(rates)
    return list(accumulate(best - rates[decision.arm] for decision in decisions))


def ucb1_regret_bound(rates: Sequence[float], n_rounds: int) -> float:
    """Theorem 1 of Auer, Cesa-Bianchi and Fischer 2002: sum 8 ln T / gap + (1 + pi²/3) sum gap."""
    gaps = [max(rates) - rate for rate in rates if rate < max(rates)]
    return sum(8.0 * log(n_rounds) / gap for gap in gaps) + (1.0 + pi**2 / 3.0) * sum(gaps)
