"""What outlives a request on a GPU: a state of fixed capacity, and every step over it as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from flashspec.core import PLAIN, Arm, Draft, full_gpu_said
from flashspec.drafters.base import Drafter, NoDraft, Proposer
from flashspec.engine.costs import measure_costs
from flashspec.engine.graphs import Capture, Work
from flashspec.engine.outcome import Outcome
from flashspec.engine.prefix import PrefixCache
from flashspec.engine.state import DecodeState
from flashspec.engine.step import step, verify
from flashspec.models.base import LEAST_SLOTS, LanguageModel
from flashspec.sampling.sampler import Sampler

# Columns of a draft that the host wrote, rounded up, so that few graphs are needed: forwards of 4, 8, 16 ... tokens.
WIDTHS = (0, 3, 7, 15, 31, 63, 64)
MOST_SETTINGS = 8  # whose graphs are kept, of one size
T = TypeVar("T")


class _Given:
    """Where drafts of the host go: one copy from pinned memory. It is free again when a host drafter writes, since the
    loop has landed all steps by then."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        lengths = rows * width + rows * width % 2  # at 16 bytes, as kernels have them elsewhere
        self.packed = torch.zeros(lengths + rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.sent = torch.zeros(lengths + rows, dtype=torch.int64, device=device)
        self.here, self.there = (
            Draft(tensor[: rows * width].view(rows, width), tensor[lengths:]) for tensor in (self.packed, self.sent)
        )


class Workspace:
    """Rows of one capacity, lent to one batch at a time.

    The first time that a step (of an arm, under settings that need the same operations) is taken it runs as it is,
    which compiles what has to be compiled; the second time it is captured, from then on replayed. Work that cannot be
    captured goes on running as it is, and a warning says so once.
    """

    def __init__(
        self,
        model: LanguageModel,
        arms: Sequence[Arm],
        drafters: Mapping[str, Drafter],
        size: tuple[int, int, int],
        capture: Capture,
    ) -> None:
        """size: rows, their capacity, stop tokens a row."""
        self.state = DecodeState.allocate(model, *size)
        self.costs = measure_costs(model, size[0], capture=capture)
        self.state.capture = self._run
        self.arms = arms
        self.drafters = drafters
        self._record = capture
        self._proposers: dict[str, Proposer] = {}
        self._samplers: dict[Hashable, Sampler] = {}  # by settings, the latest last
        self._settings: Hashable = None
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, Work] = {}
        self._outcomes: dict[Hashable, Outcome] = {}
        self._given: dict[int, _Given] = {}

    @torch.inference_mode()
    def admit(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_ids: Sequence[int],
        sampler: Sampler,
        num_logprobs: int | None,
        token_cost: float,
        memory: PrefixCache | None,
    ) -> DecodeState:
        """Begin a batch, prefilled; the sampler must have as many rows as the workspace. Settings that are new here are
        warmed up first: every arm is compiled and captured."""
        state = self.state
        self._settings = sampler.signature(), num_logprobs
        known = self._samplers.pop(self._settings, None) or sampler.clone()
        while len(self._samplers) >= MOST_SETTINGS:
            self._forget(next(iter(self._samplers)))
        self._samplers[self._settings] = known
        if (self._settings, PLAIN) not in self._seen:
            rows = len(state.tokens)
            state.admit([[0] * 4] * rows, [state.capacity] * rows, (), known, num_logprobs, token_cost)
            with self._over_all_slots():
                self._warm_up()
        known.assign(sampler)
        state.admit(prompts, limits, stop_ids, known, num_logprobs, token_cost, memory)
        state.prepare()
        return state

    def _forget(self, settings: Hashable) -> None:
        """The graphs of steps under settings that were not asked for lately."""
        del self._samplers[settings]
        for key in [key for key in self._seen if isinstance(key, tuple) and key[0] == settings]:
            self._seen.remove(key)
            self._captured.pop(key, None)
            self._outcomes.pop(key, None)

    @torch.inference_mode()
    def wipe(self) -> None:
        """Forget what a batch left behind that failed somewhere: half a cache, or one with NaN in it, which no mask
        hides, since 0 times NaN is NaN."""
        for reader in self.state.readers:
            reader.cache.keys.zero_()
            reader.cache.values.zero_()
            reader.stale = self.state.bound

    def proposer(self, name: str, drafter: Drafter) -> Proposer:
        """The proposer that graphs of this workspace hold; one that works on the host begins anew with every batch."""
        if drafter.on_host:
            return drafter.start(self.state)
        if name not in self._proposers:
            self._proposers[name] = drafter.start(self.state)
        return self._proposers[name]

    def take(self, arm: Arm, proposer: Proposer) -> Outcome:
        """One step of an arm whose drafter works on the device."""
        state = self.state
        proposer.prepare(state)
        return self._step((self._settings, arm), lambda: step(state, proposer, arm.length))

    def _warm_up(self) -> None:
        rows, longest = len(self.state.tokens), 0
        for each in self.drafters.values():  # before a graph holds where they are
            self.state.record_features(each.feature_layers)
        for _ in range(2):
            for size in self.state.chunks:  # catching up is captured too
                self.state.target.stale = size
                self.state.prepare()
            self.take(PLAIN, NoDraft())
        for arm in self.arms:
            drafter = self.drafters[arm.drafter] if arm.length else None
            if drafter is None:
                continue
            if drafter.on_host:
                longest = max(longest, arm.length)
                continue
            try:
                proposer = self.proposer(arm.drafter, drafter)
                for _ in range(2):
                    for size in self.state.chunks:
                        for reader in self.state.readers[1:]:
                            reader.stale = size + reader.lag
                        proposer.prepare(self.state)
                    self.take(arm, proposer)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                continue  # a drafter that fails will say so to the request that asks for it
        for width in WIDTHS[1 : WIDTHS.index(round_up(longest)) + 1]:
            for _ in range(2):
                self.verify_given(Draft(torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows).long()))

    def verify_given(self, draft: Draft) -> Outcome:
        """The rest of a step, of a draft that was written on the host: it is copied to where a graph reads it."""
        if draft.logits is not None or draft.faulty is not None:
            return verify(self.state, draft)  # of a class that only has generate_draft: outside the graphs
        width = draft.token_ids.shape[1]
        room = round_up(width)
        if not room:
            return self.take(PLAIN, NoDraft())
        given = self._room(room)
        given.here.token_ids[:, :width], given.here.lengths[:] = draft.token_ids, draft.lengths
        given.sent.copy_(given.packed, non_blocking=True)
        return self._step((self._settings, f"a draft of {room} tokens"), lambda: verify(self.state, given.there))

    def _room(self, width: int) -> _Given:
        if width not in self._given:
            self._given[width] = _Given(len(self.state.tokens), width, self.state.tokens.device)
        return self._given[width]

    def _step(self, key: Hashable, work: Callable[[], Outcome]) -> Outcome:
        def keep() -> None:
            self._outcomes[key] = work()

        self._run(key, keep)
        return self._outcomes[key]

    def _run(self, key: Hashable, work: Work) -> None:
        if key in self._captured:
            self._captured[key]()
        elif key not in self._seen:
            work()
            self._seen.add(key)
        else:
            with self._over_all_slots():
                self._captured[key] = self._record(work)
            self._captured[key]()

    @contextmanager
    def _over_all_slots(self) -> Iterator[None]:
        """A graph cannot know how long the texts will be."""
        bound, self.state.bound = self.state.bound, self.state.capacity
        try:
            yield
        finally:
            self.state.bound = bound


def round_up(width: int) -> int:
    return next(room for room in WIDTHS if room >= width)


class Workspaces:
    """An engine's workspaces by size, each rounded up so that few are needed; the least recently used are dropped."""

    MOST = 8  # batches of 1, 2, 4 ... 32 rows are six

    def __init__(
        self, model: LanguageModel, arms: Sequence[Arm], drafters: Mapping[str, Drafter], capture: Capture
    ) -> None:
        self.model = model
        self.arms = arms
        self.drafters = drafters
        self.capture = capture
        self._kept: dict[tuple[int, int, int], Workspace] = {}

    def find(self, rows: int, capacity: int, num_stops: int) -> Workspace:
        """A workspace with room for as much."""
        size = (
            power_of_two(rows),
            min(power_of_two(max(capacity, LEAST_SLOTS)), self.model.max_context),
            4 * max(1, -(-num_stops // 4)),
        )
        found = self._kept.pop(size, None)
        while len(self._kept) >= self.MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[size] = found or self.with_room(
            lambda: Workspace(self.model, self.arms, self.drafters, size, self.capture)
        )
        return self._kept[size]

    def with_room(self, work: Callable[[], T], keep: Workspace | None = None) -> T:
        """What the work returns. Where it runs out of memory, all workspaces but one go, and it is done once more.
        FlashSpecError where that is not enough."""
        with suppress(torch.OutOfMemoryError):
            return work()
        self._kept = {size: workspace for size, workspace in self._kept.items() if workspace is keep}
        gc.collect()  # a workspace and its state hold each other
        torch.cuda.empty_cache()
        return full_gpu_said()(work)()


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
