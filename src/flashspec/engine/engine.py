"""The public engine: prompts in, exact text out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

from flashspec.bandit import DraftSelector, make_selector
from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import PLAIN, Arm, GenerationResult, StepRecord, full_gpu_said
from flashspec.engine.arms import (
    check_arms,
    default_arms,
    default_drafters,
    listed,
    load_drafter,
    make_drafter,
    unique_names,
)
from flashspec.engine.costs import CostTable, measure_costs
from flashspec.engine.generation import Conversation, Generation
from flashspec.engine.graphs import CudaGraphs, WherePossible
from flashspec.engine.prefix import PrefixCache
from flashspec.engine.prompts import Prompt, encode_prompts
from flashspec.engine.workspace import Workspaces, power_of_two
from flashspec.metrics import AcceptanceTracker, LatencyTracker, ThroughputTracker
from flashspec.models.base import LanguageModel
from flashspec.models.loading import DEFAULT, LoadedModel, check_device, load_model
from flashspec.models.tokenizer import Tokenizer

Progress = Callable[[str, float | None], None]


@dataclass(slots=True)
class Metrics:
    """What an engine has seen since it was built; None where its MetricsConfig turns a tracker off."""

    acceptance: AcceptanceTracker | None
    throughput: ThroughputTracker | None
    latency: LatencyTracker | None

    def record(self, step: StepRecord) -> None:
        if self.acceptance is not None:
            for row in step.rows:
                self.acceptance.record(row.accepted, row.drafted)
        if self.throughput is not None:
            self.throughput.record(step.emitted, step.seconds)
        if self.latency is not None:
            self.latency.record(step.seconds)


class Turn:
    """A lock that says so where its own thread holds it, instead of waiting for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise RuntimeError("an earlier stream of this engine is unfinished; exhaust it or call its result() first")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()


class SpeculativeEngine:
    """A target, its drafters and the selector that chooses among their arms.

    target: a LoadedModel, a transformers model, an object that fulfils LanguageModel, or a name. drafters: each a
    Drafter, a registered name, an object with `generate_draft`, or a model in any of the target's forms. bandit: a
    selector with one arm for each of `arms`, for batches of every size; None makes the configured one for each power of
    two, since what an arm costs depends on the rows. arms: Arm objects or names such as
    'ngram:4' and 'plain'; None is one arm a drafter at `config.sampling.gamma` (plain without drafters). A single
    drafter or arm counts as a list of one, and settings may be dicts.
    One batch runs at a time: calls from several threads wait for each other, and a thread with an unfinished stream
    gets a RuntimeError.
    """

    @full_gpu_said()
    def __init__(
        self,
        config: FlashSpecConfig | Mapping[str, Any],
        drafters: Any,
        target: Any,
        bandit: DraftSelector | None = None,
        *,
        arms: Sequence[Arm | str] | Arm | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config = FlashSpecConfig.model_validate(config)
        loaded = _load(target, config)
        self.target: LanguageModel = loaded.model
        self.tokenizer = tokenizer or loaded.tokenizer
        self.eos_token_ids = loaded.eos_token_ids
        load = partial(load_drafter, load=partial(_load, config=config))
        self.drafters = unique_names([make_drafter(drafter, self.target, load) for drafter in listed(drafters)])
        if arms is None:
            arms = [Arm(name, config.sampling.gamma) for name in self.drafters] or [PLAIN]
        self.arms = check_arms([Arm.parse(arm) if isinstance(arm, str) else arm for arm in listed(arms)], self.drafters)
        device = self.target.device
        capture = None
        if device.type == "cuda":
            check_device(device)
            capture = WherePossible(CudaGraphs(device))
        self.costs = measure_costs(self.target, capture=capture)
        self.workspaces = None if capture is None else Workspaces(self.target, self.arms, self.drafters, capture)
        self.selector = bandit if bandit is not None else self._make_selector(self.costs)
        self._by_rows: dict[int, DraftSelector] | None = {} if bandit is None else None
        if self.selector.n_arms != len(self.arms):
            raise ValueError(f"bandit has {self.selector.n_arms} arms; the engine has {len(self.arms)}")
        settings = config.metrics
        self.metrics = Metrics(
            AcceptanceTracker(max(arm.length for arm in self.arms) or 1) if settings.track_acceptance else None,
            ThroughputTracker() if settings.track_throughput else None,
            LatencyTracker(settings.latency_window) if settings.track_latency else None,
        )
        self.turn = Turn()

    @classmethod
    def from_pretrained(
        cls,
        target: Any = None,
        drafters: Any = None,
        *,
        config: FlashSpecConfig | Mapping[str, Any] | None = None,
        arms: Sequence[Arm | str] | Arm | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> SpeculativeEngine:
        """The shortest way in: names, and the rest is found. settings are fields of FlashSpecConfig (changes to
        `config` where there is one), whose target_name and drafter_name stand in for target and drafters; without them
        it is the embedded model with `default_drafters`.

        arms None: for the strategy `auto` plain decoding and every drafter at each of its usual lengths, for the
        others one arm a drafter at `sampling.gamma`. progress(what, fraction or None) hears of downloads."""
        given = FlashSpecConfig.model_validate(config).model_dump() if config is not None else {}
        config = FlashSpecConfig(**{**given, **settings})
        loaded = _load(target or config.target_name or DEFAULT, config, progress)
        if drafters is None:
            drafters = (
                [config.drafter_name] if config.drafter_name else default_drafters(loaded.model, config.bandit.strategy)
            )
        load = partial(load_drafter, load=partial(_load, config=config))
        made = [make_drafter(drafter, loaded.model, load) for drafter in listed(drafters)]
        if arms is None and config.bandit.strategy == "auto":
            arms = default_arms(unique_names(made))
        return cls(config, made, loaded, arms=arms)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> GenerationResult:
        """Decode to the end. prompt: text, a chat, token ids, or a list of these, where -1 pads ids.

        sampling None is the engine's own; changes are single fields of it (temperature=0, seed=1, ...). ValueError
        for a prompt that is empty, holds ids outside the vocabulary or leaves no room in the target's context."""
        generation = self.stream(prompt, max_new_tokens, sampling=sampling, **changes)
        for _ in generation.records():
            pass
        return generation.result()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        memory: PrefixCache | None = None,
        **changes: Any,
    ) -> Generation:
        """The same, as an iterator of Chunks with a `result()` of all that has been written so far."""
        settings = self._sampling(sampling)
        if changes:
            settings = SamplingConfig(**{**settings.model_dump(), **changes})
        limit = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not isinstance(limit, Integral) or limit < 1:
            raise ValueError(f"max_new_tokens is {limit!r}; it should be an integer, at least 1")
        if settings.stop and self.tokenizer is None:
            raise ValueError(f"stop is {settings.stop!r}, but stop strings need a tokenizer")
        prompts = encode_prompts(prompt, self.tokenizer, self.target)
        return Generation(self, prompts, limit, settings, memory)

    def warm_up(self, rows: int = 1, sampling: SamplingConfig | Mapping[str, Any] | None = None) -> None:
        """On a GPU compile and capture what batches of so many rows need, sampled so and in texts of up to 1,024
        tokens, which the first of them would do otherwise; nothing on a CPU."""
        if self.workspaces is not None:
            with self.turn:
                Generation(self, [[0]] * rows, 1, self._sampling(sampling), None).begin()

    def selector_for(self, rows: int, costs: CostTable | None = None) -> DraftSelector:
        """The one that learns from batches of about so many rows; `selector` is the one for a single row. costs: of
        forwards of so many rows, for one that is new."""
        if rows == 1 or self._by_rows is None:
            return self.selector
        size = power_of_two(rows)
        if size not in self._by_rows:
            self._by_rows[size] = self._make_selector(costs or self.costs.for_rows(rows))
        return self._by_rows[size]

    def conversation(self, system: str | None = None) -> Conversation:
        """A chat that keeps its messages and its caches."""
        return Conversation(self, system)

    def _sampling(self, given: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
        return self.config.sampling if given is None else SamplingConfig.model_validate(given)

    def _make_selector(self, costs: CostTable) -> DraftSelector:
        bandit = self.config.bandit
        return make_selector(
            bandit.strategy,
            bandit.n_arms or len(self.arms),
            window_size=bandit.window_size,
            exploration_constant=bandit.ucb_exploration_constant,
            prior_alpha=bandit.thompson_prior_alpha,
            prior_beta=bandit.thompson_prior_beta,
            true_rates=bandit.true_rates,
            seed=bandit.seed,
            arms=[(arm.drafter, arm.length) for arm in self.arms],
            seconds=[costs.at(1 + self._width(arm)) for arm in self.arms],
        )

    def _width(self, arm: Arm) -> int:
        """How many tokens an arm may be thought to draft before it did; those on the host tend to stop early."""
        return 0 if arm.length == 0 or self.drafters[arm.drafter].on_host else arm.length


def _load(source: Any, config: FlashSpecConfig, progress: Progress | None = None) -> LoadedModel:
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, LanguageModel):
        return LoadedModel(source, None, (), type(source).__name__)
    return load_model(source, device=config.device, dtype=config.dtype, progress=progress)
