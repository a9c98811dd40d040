"""Which arm next? What every policy shares: counts, windows, late feedback, quarantine, JSON, one lock."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any, ClassVar, NamedTuple, Self

from flashspec.bandit.estimates import ArmStats, real_number, whole_number

Rows = tuple[tuple[int, int], ...]


class Feedback(NamedTuple):
    """What `DraftSelector.update` was told of a step, checked."""

    arm: int
    accepted: int
    drafted: int
    rows: Rows | None
    critical: Sequence[bool] | None
    seconds: float | None
    more: bool = False


# Feedback is at most eight steps late in each of a few threads. A selection still unanswered after this many
# more never will be (its request was cancelled), and no longer counts as a pull.
MAX_OUTSTANDING = 64


class DraftSelector(ABC):
    """Chooses an arm, hears how many of its draft tokens were accepted, and may hear it several rounds late.

    An arm's estimate rests on its last `window_size` pulls (0: on all of them, for ever), except those
    - older than window_size * n_arms rounds. Stale arms are thereby tried again: one that got better while
      another was played would otherwise stay unseen. The factor n_arms leaves every arm window_size pulls on
      average; with 500 rounds between 50 arms (one at 0.9, the others at 0.1), UCB1 played the best one 13 % of
      the time instead of 82 %;
    - made before the played arm's rate last shifted (`ArmStats.shift`), whichever arm they belong to. When
      rates 0.7/0.5/0.3 swap ends after 1,000 rounds, Thompson sampling is back on the best arm after 11 rounds
      (median of 20 seeds, worst 47); without this it took 261 (worst 751).

    A policy implements `_choose` and `_options`; it may extend `_begin`, `_learn`, `_charge`, `_reset`, `_state` and
    `_restore`, which run with the lock held. Every public method may be called from any thread.
    """

    gives_way: ClassVar[bool] = False  # whether an arm that finds nothing to propose is another's chance in that step

    _kinds: ClassVar[dict[str, type[DraftSelector]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        DraftSelector._kinds[cls.__name__] = cls

    def __init__(self, n_arms: int, window_size: int = 500) -> None:
        """ValueError unless n_arms >= 1 and window_size >= 0 are integers."""
        self._n_arms = whole_number("n_arms", n_arms, 1)
        self._window_size = whole_number("window_size", window_size)
        self._lock = Lock()
        self._enabled = list(range(self._n_arms))
        DraftSelector._reset(self)  # not the policy's own, whose fields are yet to come

    @property
    def n_arms(self) -> int:
        return self._n_arms

    @property
    def window_size(self) -> int:
        return self._window_size

    @property
    def t(self) -> int:
        """Rounds whose feedback has arrived."""
        return self._t

    @property
    def stats(self) -> tuple[ArmStats, ...]:
        """A snapshot, one entry an arm."""
        with self._lock:
            return tuple(stats.copy() for stats in self._stats)

    @property
    def enabled(self) -> tuple[int, ...]:
        """The arms that `select` may return, in order."""
        with self._lock:
            return tuple(self._enabled)

    def begin(self, rows: int) -> None:
        """A batch of so many rows begins: texts of which nothing is known. ValueError unless rows >= 1."""
        rows = whole_number("rows", rows, 1)
        with self._lock:
            self._begin(rows)

    def select(self, asleep: Collection[int] = ()) -> int:
        """The arm to play next; never a disabled one, nor one of `asleep`, which have no chance in this step: one of
        them was chosen, and gave way. ValueError if that leaves none."""
        with self._lock:
            awake = [arm for arm in self._enabled if arm not in asleep] if asleep else self._enabled
            if not awake:
                raise ValueError(f"asleep names all arms that are enabled, {self._enabled}")
            arm = self._choose(awake)
            self._n_selected += 1
            self._outstanding[arm] += 1
            self._pending.append((self._n_selected, arm))
            while self._pending[0][0] <= self._n_selected - MAX_OUTSTANDING:
                self._outstanding[self._pending.popleft()[1]] -= 1
            return arm

    def rival(self, arm: int) -> float:
        """What the best arm of another drafter is expected to yield, in tokens for the time of a step that `arm`
        takes itself; for policies that know nothing of it 1.0, the least that any step does."""
        return 1.0

    def update(
        self,
        arm: int,
        accepted: int,
        drafted: int | None = None,
        *,
        rows: Sequence[tuple[int, int]] | None = None,
        critical: Sequence[bool] | None = None,
        seconds: float | None = None,
        more: bool = False,
    ) -> None:
        """Report one step of `arm`: `accepted` of `drafted` draft tokens, all rows together.

        rows: (drafted, accepted) of every row of the batch, adding up to the totals. critical: which rows the batch
        may have to wait for from now on; None: all, or behind a plain step those that it was. seconds: what the step
        took. Only policies that know of costs use these. more: another report is expected before the next choice, so
        that conclusions can wait for it. ValueError, and nothing recorded, for an unknown arm, a count that is a bool
        or a float, accepted outside [0, drafted], rows that do not add up, a `critical` that is not as long, or seconds
        that are negative or not finite.
        """
        arm = self._known(arm)
        accepted = whole_number("accepted", accepted)
        drafted = max(1, accepted) if drafted is None else whole_number("drafted", drafted)
        checked_rows = None if rows is None else _checked_rows(rows, accepted, drafted)
        if critical is not None and checked_rows is not None and len(critical) != len(checked_rows):
            raise ValueError(f"critical should say of every row whether it is, got {critical!r}")
        if seconds is not None:
            seconds = real_number("seconds", seconds, 0.0)
        with self._lock:
            self._stats[arm].record(accepted, drafted, at=self._t + 1)
            self._t += 1
            self._settle(arm)
            if self._window_size:
                self._move_window(arm)
            self._learn(Feedback(arm, accepted, drafted, checked_rows, critical, seconds, more))

    def give_way(self, arm: int, seconds: float = 0.0) -> None:
        """Report that `arm` was selected and had nothing to propose, by which so many seconds were lost: its selection
        comes to nothing, and another is made for the same step. ValueError for an unknown arm, or seconds that are
        negative or not finite."""
        arm, seconds = self._known(arm), real_number("seconds", seconds, 0.0)
        with self._lock:
            self._settle(arm)
            self._charge(arm, seconds)

    def disable(self, arm: int) -> None:
        """Keep `arm` out of `select` until it is enabled; ValueError if no arm would be left."""
        arm = self._known(arm)
        with self._lock:
            if self._enabled == [arm]:
                raise ValueError(f"arm {arm} is the last one enabled: enable another before disabling it")
            self._enabled = [other for other in self._enabled if other != arm]

    def enable(self, arm: int) -> None:
        arm = self._known(arm)
        with self._lock:
            self._enabled = sorted({*self._enabled, arm})

    def reset(self) -> None:
        """Forget everything learned and restart a seeded policy's random choices; disabled arms stay so."""
        with self._lock:
            self._reset()

    def to_json(self) -> str:
        """The whole selector; one restored from it goes on with the same choices, but knows a batch's rows apart only
        from the next batch on."""
        with self._lock:
            document = {"selector": type(self).__name__, "options": self._options(), "state": self._state()}
            return json.dumps(document, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The selector that `to_json` wrote; ValueError if `text` is damaged or describes no `cls`."""
        try:
            document = json.loads(text)
            kind = DraftSelector._kinds[document["selector"]]
            options, state = document["options"], document["state"]
            if not issubclass(kind, cls):
                raise ValueError(f"it describes a {kind.__name__}")
            if len(state["arms"]) != options["n_arms"]:
                raise ValueError(f"n_arms = {options['n_arms']}, but it describes {len(state['arms'])} arms")
            selector = kind(**options)
            selector._restore(state)
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(f"text should be the to_json() of a {cls.__name__}: {error!r}") from error
        return selector

    @abstractmethod
    def _choose(self, arms: Sequence[int]) -> int:
        """One of `arms`, which are enabled, in order, and at least one."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""

    def _begin(self, rows: int) -> None:  # noqa: B027  (the counts are enough for most policies)
        """What earlier batches said is not of this one's rows."""

    def _charge(self, arm: int, seconds: float) -> None:  # noqa: B027
        """An arm lost time in a step that others took."""

    def _learn(self, step: Feedback) -> None:  # noqa: B027
        """Use a step's checked facts, after the counts and the window have taken them in; at once, or by the next
        choice where `step.more`."""

    def _reset(self) -> None:
        self._t = 0
        self._oldest = 1  # first round of the window; the last is t
        self._stats = [ArmStats(self._window_size) for _ in range(self._n_arms)]
        self._n_selected = 0
        self._pending: deque[tuple[int, int]] = deque()  # (number of the selection, arm), feedback to come
        self._outstanding = [0] * self._n_arms  # the same, counted by arm

    def _state(self) -> dict[str, Any]:
        return {
            "t": self._t,
            "oldest": self._oldest,
            "arms": [stats.state() for stats in self._stats],
            "n_selected": self._n_selected,
            "pending": [list(selection) for selection in self._pending],
            "enabled": self._enabled,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what `_state` gave; ValueError, TypeError or LookupError if it is inconsistent."""
        self._t = whole_number("t", state["t"])
        self._oldest = whole_number("oldest", state["oldest"], 1)
        self._stats = [ArmStats.from_state(self._window_size, arm) for arm in state["arms"]]
        rounds = [pull[0] for arm in state["arms"] for pull in arm["pulls"]]
        if sum(stats.lifetime_pulls for stats in self._stats) != self._t or len(set(rounds)) != len(rounds):
            raise ValueError(f"the arms' pulls do not make up t = {self._t} rounds")
        if any(not self._oldest <= at <= self._t for at in rounds) or self._oldest > self._t + 1:
            raise ValueError(f"a pull lies outside the window, rounds {self._oldest} to {self._t}")
        self._n_selected = whole_number("n_selected", state["n_selected"])
        self._pending = deque(
            (whole_number("selection", number, 1), self._known(arm)) for number, arm in state["pending"]
        )
        numbers = [number for number, _ in self._pending]
        if numbers != sorted(set(numbers)) or (numbers and numbers[-1] > self._n_selected):
            raise ValueError(f"pending selections {numbers} should rise to at most {self._n_selected}")
        self._outstanding = [sum(arm == other for _, other in self._pending) for arm in range(self._n_arms)]
        self._enabled = sorted({self._known(arm) for arm in state["enabled"]})
        if not self._enabled:
            raise ValueError("no arm is enabled")

    @property
    def _rounds_in_window(self) -> int:
        return self._t - self._oldest + 1

    def _known(self, arm: int) -> int:
        number = whole_number("arm", arm)
        if number >= self._n_arms:
            raise ValueError(f"arm should be below n_arms = {self._n_arms}, got {number}")
        return number

    def _settle(self, arm: int) -> None:
        """The oldest outstanding selection of `arm`, if there is one, has its answer."""
        for place, (_, other) in enumerate(self._pending):
            if other == arm:
                del self._pending[place]
                self._outstanding[arm] -= 1
                return

    def _move_window(self, played: int) -> None:
        oldest = self._t - self._window_size * self._n_arms + 1
        shift = self._stats[played].shift()
        if shift is not None:
            oldest = max(oldest, shift)
        if oldest > self._oldest:
            self._oldest = oldest
            for stats in self._stats:
                stats.expire(oldest)


def _checked_rows(rows: Sequence[tuple[int, int]], accepted: int, drafted: int) -> Rows:
    try:
        checked = tuple((whole_number("drafted", d), whole_number("accepted", a)) for d, a in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows should be pairs of counts (drafted, accepted): {error}") from error
    totals = sum(row[0] for row in checked), sum(row[1] for row in checked)
    if totals != (drafted, accepted) or any(row[1] > row[0] for row in checked):
        raise ValueError(f"rows should add up to (drafted, accepted) = {(drafted, accepted)}, got {checked}")
    return checked
