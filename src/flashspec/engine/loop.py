"""A batch from its prompts to its last tokens: choose an arm, run a step, learn from it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import and_
from warnings import warn

import torch

from flashspec.bandit import DraftSelector
from flashspec.core import PLAIN, Arm, Draft, FinishReason, StepRecord
from flashspec.drafters.base import DraftContext, Drafter, NoDraft, Proposer
from flashspec.engine.outcome import IN_FLIGHT, Letter, News, Outcome
from flashspec.engine.state import DecodeState
from flashspec.engine.step import verify
from flashspec.engine.workspace import Workspace
from flashspec.kernels.checks import check
from flashspec.models.reader import Reader

STAY = 16  # more steps that an arm is played where the host is late
LASTING = 16  # late steps in a row: from then on the host's time is what a step takes
CRITICAL = 0.95  # of what the row that is furthest behind has still to write: such rows end last


@dataclass(slots=True)
class StepOutput:
    """rows: those that were unfinished, which the record has an entry each of."""

    record: StepRecord
    rows: list[int]
    news: News


@dataclass(slots=True)
class _Flight:
    """A step whose outcome the host has not read yet."""

    arm: Arm
    width: int  # the most tokens that a row may have grown by
    counted: set[Reader]  # whose `stale` holds the width
    letter: Letter
    started: float
    active: list[bool]
    arm_index: int | None  # of the selector's arms
    lost: float  # seconds of it that are charged to arms which gave way
    usual: bool  # whether its time says what such a step takes


class DrafterFailed(Exception):
    """A drafter raised; the text is untouched."""


class _Guarded(Proposer):
    """A proposer whose exceptions can be told from those of the target."""

    def __init__(self, start: Callable[[], Proposer]) -> None:
        with _blaming_the_drafter():
            self.inner = start()

    def prepare(self, context: DraftContext) -> None:
        with _blaming_the_drafter():
            self.inner.prepare(context)

    def expects_nothing(self, context: DraftContext, length: int) -> bool:
        with _blaming_the_drafter():
            return self.inner.expects_nothing(context, length)

    def propose(self, context: DraftContext, length: int) -> Draft:
        with _blaming_the_drafter():
            draft = self.inner.propose(context, length)
            _check(draft, len(context.tokens), length, context.target.model.vocab_size)
            return draft


def _check(draft: Draft, rows: int, length: int, vocab_size: int) -> None:
    """ValueError for a draft that is no `Draft` of so many rows, is too wide, and where reading them is free for ids
    outside the vocabulary and lengths outside the draft."""
    ids, lengths, columns = draft.token_ids, draft.lengths, draft.token_ids.shape[-1]
    if columns > length:
        raise ValueError(f"its draft has {columns} columns; it was asked for {length}")
    check("its draft's token_ids", ids, (rows, columns), (torch.int64,), ids.device)
    check("its draft's lengths", lengths, (rows,), (torch.int64,), ids.device)
    if draft.logits is not None:
        check("its draft's logits", draft.logits, (rows, columns, vocab_size), (draft.logits.dtype,), ids.device)
    if draft.faulty is not None:
        check("its draft's faulty", draft.faulty, (rows,), (torch.bool,), ids.device)
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"its draft holds ids outside the vocabulary of {vocab_size}")
    if lengths.device.type == "cpu" and rows and not 0 <= int(lengths.min()) <= int(lengths.max()) <= columns:
        raise ValueError(f"its draft's lengths are {lengths.tolist()}; it has {columns} columns")


@contextmanager
def _blaming_the_drafter() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise DrafterFailed(f"{type(error).__name__}: {error}") from error


def _is_empty(draft: Draft) -> bool:
    """Whether there is no token in it and nothing wrong with it, as far as that can be known without waiting."""
    if draft.lengths.device.type != "cpu":
        return False
    return not draft.lengths.any() and (draft.faulty is None or not draft.faulty.any())


class Run:
    """Iterating it decodes, one step an item, until every row is finished.

    Proposers start lazily, so that a drafter which is never chosen costs nothing. A drafter that raises or drafts NaN
    is out for the rest of the run, and the step is taken without it. lag: how many steps the host may be behind the
    device: 0 where reading a result is free, 1 on a GPU; drafters that work on the host wait for the news. workspace:
    where the state comes from, if it is a GPU's; it takes the steps.
    """

    def __init__(
        self,
        state: DecodeState,
        arms: Sequence[Arm],
        selector: DraftSelector,
        drafters: Mapping[str, Drafter],
        lag: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        workspace: Workspace | None = None,
    ) -> None:
        self.state = state
        self.workspace = workspace
        self.arms = arms
        self.selector = selector
        self.drafters = drafters
        assert lag < IN_FLIGHT
        self.lag = lag
        self.clock = clock
        self.proposers: dict[str, Proposer] = {"": NoDraft()}
        self.broken: set[str] = set()
        self._disabled: list[int] = []
        self.flights: deque[_Flight] = deque()
        self._untold: list[Callable[[], None]] = []  # what the selector is to hear
        self._landed = 0.0  # when the last flight did
        self._late = 0  # how many in a row the device was done with by then, so that the time may be the host's
        self._decided, self._stays = 0, 0  # an arm, and for how many more steps
        # One row is what all of them are together.
        self._tells_rows_apart = len(state.texts) > 1 and any(arm.length for arm in arms)
        selector.begin(len(state.texts))
        for drafter in drafters.values():
            state.record_features(drafter.feature_layers)

    def __iter__(self) -> Iterator[StepOutput]:
        while any(self.state.active):
            if not self._goes_on():
                yield self._land()
                continue
            self._tell()
            arm_index = self._decide()
            arm = PLAIN if arm_index is None else self.arms[arm_index]
            landed = []
            while self.flights and self._is_on_host(arm):
                landed.append(self._land())
            try:
                if any(self.state.active):
                    self.flights.append(self._launch(arm_index, arm))
                self._tell()  # while the device works
            finally:
                yield from landed
            if len(self.flights) > self.lag:
                yield self._land()
        self._tell()
        self.flights.clear()  # steps that ran ahead of the news that every row is done

    @torch.inference_mode()
    def cancel(self, row: int, reason: FinishReason) -> None:
        """End a row from the host, as a stop string does."""
        self.state.active[row] = False
        self.state.finish[row] = int(reason)

    @torch.inference_mode()
    def _launch(self, arm_index: int | None, arm: Arm) -> _Flight:
        state = self.state
        state.prepare()
        started, reads = self.clock(), state.long_reads  # a prefill is no arm's doing, but what follows waits for it
        usual = not self.lag or bool(self.flights or self._landed)
        gave_way, moment = dict[int, float](), started  # arms, and the time lost by them
        ready = [reader for reader in state.readers if reader.takes_part]
        while True:
            try:
                outcome = self._attempt(arm_index, arm)
            except DrafterFailed as failure:
                self._quarantine(arm.drafter, str(failure))
                arm_index, arm, moment = None, PLAIN, self.clock()
                continue
            if outcome is not None:
                break
            assert arm_index is not None  # plain decoding never gives way
            for reader in state.readers:
                if reader not in ready:
                    reader.sits_out()
            silent, before, moment = arm_index, moment, self.clock()
            gave_way[silent] = moment - before
            arm_index = self._choose(self._asleep(gave_way))
            arm = PLAIN if arm_index is None else self.arms[arm_index]
        counted: set[Reader] = set()
        if self.lag:
            counted = self._advance(outcome.width)
            state.bound = min(state.bound + outcome.width, state.capacity)
        letter, active = outcome.post(), list(state.active)
        if gave_way and self.lag and not self._is_on_host(arm):  # for the last one's sake the device idled until now
            gave_way[silent] += self.clock() - moment
        self._untold += [partial(self.selector.give_way, *facts) for facts in gave_way.items()]
        if state.long_reads > reads:
            usual = False
            for flight in self.flights:  # which the host lands late
                flight.usual = False
        return _Flight(arm, outcome.width, counted, letter, started, active, arm_index, sum(gave_way.values()), usual)

    def _goes_on(self) -> bool:
        """Whether a row may be unfinished once all has landed that is under way: a step adds a token at least."""
        state, ahead = self.state, len(self.flights)
        rows = zip(state.active, state.texts, state.ends, strict=True)
        return any(active and len(text) + ahead < end for active, text, end in rows)

    def _decide(self) -> int | None:
        """An arm. Deciding takes the host time: where the device may have waited for it, an arm that was decided on
        twice, or costs nothing, stays for a few steps."""
        if self._stays and self._is_available(self._decided):
            self._stays -= 1
            return self._decided
        arm_index, before = self._choose(), self.clock()
        if arm_index is not None and self._expects_nothing(arm_index):
            asking = self.clock() - before if self._late else 0.0  # free, unless the device has been waiting
            self.flights[-1].lost += asking
            self.selector.give_way(arm_index, asking)
            arm_index = self._choose(self._asleep([arm_index]))
        self._stays = 0
        if arm_index is not None:
            arm, again = self.arms[arm_index], arm_index == self._decided
            if self._late and self.selector.gives_way and (again or not arm.length) and not self._is_on_host(arm):
                self._stays = STAY
            self._decided = arm_index
        return arm_index

    def _is_available(self, arm_index: int) -> bool:
        return arm_index in self.selector.enabled and self.arms[arm_index].drafter not in self.broken

    def _choose(self, asleep: Collection[int] = ()) -> int | None:
        if all(index in asleep or self.arms[index].drafter in self.broken for index in self.selector.enabled):
            return None
        return self.selector.select(asleep) if asleep else self.selector.select()

    def _asleep(self, gave_way: Iterable[int]) -> list[int]:
        """The arms that have no chance in this step any more: those of drafters that gave way, and those on the host
        while it does not know the text."""
        mute = {self.arms[index].drafter for index in gave_way}
        if self.flights:
            mute |= {name for name, drafter in self.drafters.items() if drafter.on_host}
        return [index for index, arm in enumerate(self.arms) if arm.drafter in mute]

    def _is_on_host(self, arm: Arm) -> bool:
        return bool(arm.length) and self.drafters[arm.drafter].on_host

    def _expects_nothing(self, arm_index: int) -> bool:
        """Whether an arm on the host can tell, from a text that is a step old, that it would give way."""
        arm = self.arms[arm_index]
        if not (self.flights and self.selector.gives_way and self._is_on_host(arm)):
            return False
        try:
            return self._proposer(arm_index, arm).expects_nothing(self.state, arm.length)
        except DrafterFailed as failure:
            self._quarantine(arm.drafter, str(failure))
            return True

    def _proposer(self, arm_index: int | None, arm: Arm) -> Proposer:
        if arm_index is not None and self._is_on_host(arm):
            self.state.rival = self.selector.rival(arm_index)
        if arm.drafter not in self.proposers:
            self.proposers[arm.drafter] = _Guarded(partial(self._start, arm.drafter))
        return self.proposers[arm.drafter]

    def _attempt(self, arm_index: int | None, arm: Arm) -> Outcome | None:
        """None: its drafter proposes nothing, so that another arm has its chance."""
        proposer = self._proposer(arm_index, arm)
        if self.workspace is not None and not self._is_on_host(arm):
            return self.workspace.take(arm, proposer)
        proposer.prepare(self.state)
        draft = proposer.propose(self.state, arm.length)
        if arm.length and self.selector.gives_way and _is_empty(draft):
            return None
        return verify(self.state, draft) if self.workspace is None else self.workspace.verify_given(draft)

    def _start(self, name: str) -> Proposer:
        drafter = self.drafters[name]
        return drafter.start(self.state) if self.workspace is None else self.workspace.proposer(name, drafter)

    def _advance(self, emitted: int) -> set[Reader]:
        """Note a step at every reader; returns those whose `stale` counts it."""
        up_to_date = {reader for reader in self.state.readers if reader.takes_part}
        for flight in self.flights:
            flight.counted -= up_to_date
        return {reader for reader in self.state.readers if reader.advance(emitted)}

    def _quarantine(self, drafter: str, reason: str) -> None:
        if drafter in self.broken:
            return
        warn(f"drafter {drafter!r} is set aside for this request: {reason}", RuntimeWarning, stacklevel=4)
        self.broken.add(drafter)
        if any(self.arms[index].drafter not in self.broken for index in self.selector.enabled):
            for index, arm in enumerate(self.arms):
                if arm.drafter == drafter and index in self.selector.enabled:
                    self.selector.disable(index)
                    self._disabled.append(index)

    def close(self) -> None:
        """Give the selector back as it was: what failed here may work for the next request."""
        self._tell()
        for index in self._disabled:
            self.selector.enable(index)

    def _land(self) -> StepOutput:
        flight, state = self.flights.popleft(), self.state
        is_late = flight.letter.is_here() and not self._is_on_host(flight.arm)
        news = flight.letter.fetch()  # waits for the device
        now, begun = self.clock(), max(flight.started, self._landed)
        behind = self._late and begun > flight.started  # begun when the host looked, not when the device did
        if (is_late or behind) and self._late < LASTING:
            flight.usual = False
        seconds, self._landed, self._late = now - begun, now, self._late + 1 if is_late else 0
        rows = [row for row, active in enumerate(map(and_, flight.active, state.active)) if active]
        for text, token_ids in zip(state.texts, news.token_ids, strict=True):
            text.extend(token_ids)
        for row in rows:
            state.active[row] = news.finish[row] is FinishReason.RUNNING
        record = StepRecord(flight.arm, tuple([news.steps[row] for row in rows]), seconds)
        self._settle(flight, record, rows, max(map(len, news.token_ids)))
        if news.faulty:
            self._quarantine(flight.arm.drafter, "its draft held NaN or an id outside the vocabulary")
        return StepOutput(record, rows, news)

    def _settle(self, flight: _Flight, record: StepRecord, rows: list[int], grown: int) -> None:
        """rows: that the record is of. grown: how many tokens the step added to a row at the most."""
        state = self.state
        ahead = sum(flight.width for flight in self.flights)
        state.bound = min(max(map(len, state.texts)) + ahead, state.capacity)
        if not self.lag:
            self._advance(grown)
        for reader in flight.counted:
            reader.stale -= flight.width - grown
        if flight.arm_index is None:
            return
        pairs = critical = None
        if self._tells_rows_apart:
            critical = self._critical(rows)
            if flight.arm.length:  # a plain step says nothing of its rows
                pairs = [(0, 0)] * len(state.texts)
                for row, step in zip(rows, record.rows, strict=True):
                    pairs[row] = step.drafted, step.accepted
        self._untold.append(
            partial(
                self.selector.update,
                flight.arm_index,
                record.accepted,
                record.drafted,
                rows=pairs,
                critical=critical,
                seconds=max(record.seconds - flight.lost, 0.0) if flight.usual else None,
                more=bool(self._stays),
            )
        )

    def _tell(self) -> None:
        for update in self._untold:
            update()
        self._untold.clear()

    def _critical(self, rows: list[int]) -> list[bool]:
        """Of every row whether the batch may have to wait for it. rows: of the step that has just landed."""
        state = self.state
        rows = [row for row in rows if state.active[row]] or rows
        left = [state.ends[row] - len(state.texts[row]) for row in rows]
        least, critical = CRITICAL * max(left, default=0), [False] * len(state.texts)
        for row, rest in zip(rows, left, strict=True):
            critical[row] = rest >= least
        return critical
