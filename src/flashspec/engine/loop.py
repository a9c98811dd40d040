"""A batch from its prompts to its last tokens: choose an arm, run a step, learn from it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from warnings import warn

import torch

from flashspec.bandit import DraftSelector
from flashspec.core import PLAIN, Arm, FinishReason, RowStep, StepRecord, TokenLogprobs
from flashspec.drafters.base import Drafter, NoDraft, Proposer
from flashspec.engine.state import DecodeState, Outcome
from flashspec.engine.step import step

HEAD = 5  # columns of Outcome.packed ahead of the tokens


@dataclass(slots=True)
class RowOutput:
    """What one step added to one row."""

    row: int
    token_ids: list[int]
    finish: FinishReason
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class StepOutput:
    record: StepRecord
    rows: list[RowOutput]


@dataclass(slots=True)
class _Flight:
    """A step whose outcome the host has not read yet."""

    arm_index: int | None
    arm: Arm
    outcome: Outcome
    started: float
    active: list[bool]

    @property
    def width(self) -> int:
        """The most tokens that a row may have grown by."""
        return self.outcome.packed.shape[1] - HEAD


class Run:
    """Iterating it decodes, one step an item, until every row is finished.

    proposers start lazily, so that a drafter which is never chosen costs nothing. A drafter that raises or drafts NaN
    is out for the rest of the run, and the step is taken without it. lag: how many steps the host may be behind the
    device: 0 where reading a result is free, 1 on a GPU.
    """

    def __init__(
        self,
        state: DecodeState,
        arms: Sequence[Arm],
        selector: DraftSelector,
        drafters: Mapping[str, Drafter],
        lag: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.state = state
        self.arms = arms
        self.selector = selector
        self.drafters = drafters
        self.lag = lag
        self.clock = clock
        self.proposers: dict[str, Proposer] = {"": NoDraft()}
        self.broken: set[str] = set()
        self.flights: deque[_Flight] = deque()

    def __iter__(self) -> Iterator[StepOutput]:
        while any(self.state.active):
            self.flights.append(self._launch())
            if len(self.flights) > self.lag:
                yield self._land()
        self.flights.clear()  # steps that ran ahead of the news that every row is done

    @torch.inference_mode()
    def cancel(self, row: int, reason: FinishReason) -> None:
        """End a row from the host: a stop string, or a caller who left."""
        self.state.active[row] = False
        self.state.finish[row] = int(reason)

    @torch.inference_mode()
    def _launch(self) -> _Flight:
        state = self.state
        state.prepare()
        started = self.clock()  # a prefill is no arm's doing
        arm_index = self._choose()
        arm = PLAIN if arm_index is None else self.arms[arm_index]
        try:
            outcome = self._attempt(arm)
        except Exception as error:
            if not arm.length:
                raise
            self._quarantine(arm.drafter, f"{type(error).__name__}: {error}")
            arm_index, arm = None, PLAIN
            outcome = self._attempt(arm)
        flight = _Flight(arm_index, arm, outcome, started, list(state.active))
        if self.lag:
            self._advance(flight.width)
        return flight

    def _choose(self) -> int | None:
        if all(arm.drafter in self.broken for arm in self.arms):
            return None
        return self.selector.select()

    def _attempt(self, arm: Arm) -> Outcome:
        if arm.drafter not in self.proposers:
            self.proposers[arm.drafter] = self.drafters[arm.drafter].start(self.state)
        proposer = self.proposers[arm.drafter]
        proposer.prepare(self.state)
        return step(self.state, proposer, arm.length)

    def _advance(self, emitted: int) -> None:
        for reader in self.state.readers:
            reader.advance(emitted)

    def _quarantine(self, drafter: str, reason: str) -> None:
        if drafter in self.broken:
            return
        warn(f"drafter {drafter!r} is set aside for this request: {reason}", RuntimeWarning, stacklevel=4)
        self.broken.add(drafter)
        if not all(arm.drafter in self.broken for arm in self.arms):
            for index, arm in enumerate(self.arms):
                if arm.drafter == drafter:
                    self.selector.disable(index)

    def _land(self) -> StepOutput:
        flight, state = self.flights.popleft(), self.state
        packed = flight.outcome.packed.tolist()  # waits for the device
        seconds = self.clock() - flight.started
        rows, steps, faulty = [], [], False
        for row, values in enumerate(packed):
            if flight.active[row] and state.active[row]:
                drafted, accepted, emitted, finish, fault = values[:HEAD]
                token_ids = values[HEAD : HEAD + emitted]
                steps.append(RowStep(drafted, accepted, emitted))
                rows.append(RowOutput(row, token_ids, FinishReason(finish), _logprobs(flight.outcome, row, token_ids)))
                state.texts[row].extend(token_ids)
                state.active[row] = finish == FinishReason.RUNNING
                faulty = faulty or bool(fault)
        record = StepRecord(flight.arm, tuple(steps), seconds)
        self._settle(flight, record)
        if faulty:
            self._quarantine(flight.arm.drafter, "its logits are not finite")
        return StepOutput(record, rows)

    def _settle(self, flight: _Flight, record: StepRecord) -> None:
        state = self.state
        ahead = sum(flight.width for flight in self.flights)
        state.bound = min(max(map(len, state.texts)) + ahead, state.capacity)
        if not self.lag:
            self._advance(max((row.emitted for row in record.rows), default=0))
        if flight.arm_index is not None:
            pairs = [(row.drafted, row.accepted) for row in record.rows]
            self.selector.update(flight.arm_index, record.accepted, record.drafted, rows=pairs, seconds=record.seconds)


def _logprobs(outcome: Outcome, row: int, token_ids: list[int]) -> list[TokenLogprobs]:
    if outcome.logprobs is None or outcome.top_ids is None or outcome.top_logprobs is None:
        return []
    chosen = outcome.logprobs[row].tolist()
    ids, values = outcome.top_ids[row].tolist(), outcome.top_logprobs[row].tolist()
    return [
        TokenLogprobs(token_id, chosen[i], tuple(zip(ids[i], values[i], strict=True)))
        for i, token_id in enumerate(token_ids)
    ]
