"""The public engine: prompts in, exact text out."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flashspec.bandit import DraftSelector, make_selector
from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import PLAIN, Arm, GenerationResult, StepRecord
from flashspec.engine.arms import check_arms, default_arms, default_drafters, make_drafter, unique_names
from flashspec.engine.costs import measure_costs
from flashspec.engine.generation import Conversation, Generation
from flashspec.engine.graphs import CudaGraphs, WherePossible
from flashspec.engine.prefix import PrefixCache
from flashspec.engine.prompts import Prompt, encode_prompts
from flashspec.engine.workspace import Workspaces, power_of_two
from flashspec.metrics import AcceptanceTracker, LatencyTracker, ThroughputTracker
from flashspec.models.base import LanguageModel
from flashspec.models.loading import DEFAULT, LoadedModel, load_model
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
    'ngram:4' and 'plain'; None is one arm a drafter at `config.sampling.gamma` (plain without drafters).
    One batch runs at a time: calls from several threads wait for each other, and a thread with an unfinished stream
    gets a RuntimeError.
    """

    def __init__(
        self,
        config: FlashSpecConfig,
        drafters: Sequence[Any],
        target: Any,
        bandit: DraftSelector | None = None,
        *,
        arms: Sequence[Arm | str] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        loaded = _load(target, config)
        self.target: LanguageModel = loaded.model
        self.tokenizer = tokenizer or loaded.tokenizer
        self.eos_token_ids = loaded.eos_token_ids
        self.drafters = unique_names(
            [make_drafter(d, self.target, partial(_load_named, config=config)) for d in drafters]
        )
        if arms is None:
            arms = [Arm(name, config.sampling.gamma) for name in self.drafters] or [PLAIN]
        self.arms = check_arms([Arm.parse(arm) if isinstance(arm, str) else arm for arm in arms], self.drafters)
        device = self.target.device
        capture = WherePossible(CudaGraphs(device)) if device.type == "cuda" else None
        self.costs = measure_costs(self.target, capture=capture)
        self.workspaces = None if capture is None else Workspaces(self.target, self.arms, self.drafters, capture)
        self.selector = bandit if bandit is not None else self._make_selector()
        self._by_rows: dict[int, DraftSelector] = defaultdict(self._make_selector if bandit is None else lambda: bandit)
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
        drafters: Sequence[Any] | None = None,
        *,
        config: FlashSpecConfig | None = None,
        arms: Sequence[Arm | str] | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> SpeculativeEngine:
        """The shortest way in: names, and the rest is found. settings are fields of FlashSpecConfig (changes to
        `config` where there is one), whose target_name and drafter_name stand in for target and drafters; without them
        it is the embedded model with `default_drafters`.

        arms None: for the strategy `auto` plain decoding and every drafter at each of its usual lengths, for the
        others one arm a drafter at `sampling.gamma`. progress(what, fraction or None) hears of downloads."""
        config = FlashSpecConfig(**{**(config.model_dump() if config else {}), **settings})
        loaded = _load(target or config.target_name or DEFAULT, config, progress)
        if drafters is None:
            drafters = (
                [config.drafter_name] if config.drafter_name else default_drafters(loaded.model, config.bandit.strategy)
            )
        made = [make_drafter(drafter, loaded.model, partial(_load_named, config=config)) for drafter in drafters]
        if arms is None and config.bandit.strategy == "auto":
            arms = default_arms(unique_names(made))
        return cls(config, made, loaded, arms=arms)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        sampling: SamplingConfig | None = None,
        **changes: Any,
    ) -> GenerationResult:
        """Decode to the end. prompt: text, a list of texts, a chat, or token ids (B, T), where -1 pads.

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
        sampling: SamplingConfig | None = None,
        memory: PrefixCache | None = None,
        **changes: Any,
    ) -> Generation:
        """The same, as an iterator of Chunks with a `result()` of all that has been written so far."""
        settings = sampling or self.config.sampling
        if changes:
            settings = SamplingConfig(**{**settings.model_dump(), **changes})
        limit = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"max_new_tokens is {limit}; it should be at least 1")
        if settings.stop and self.tokenizer is None:
            raise ValueError(f"stop is {settings.stop!r}, but stop strings need a tokenizer")
        prompts = encode_prompts(prompt, self.tokenizer, self.target)
        return Generation(self, prompts, limit, settings, memory)

    def warm_up(self, rows: int = 1, sampling: SamplingConfig | None = None) -> None:
        """On a GPU compile and capture what batches of so many rows need, which the first of them would do otherwise;
        nothing on a CPU."""
        if self.workspaces is not None:
            with self.turn:
                Generation(self, [[0]] * rows, 1, sampling or self.config.sampling, None).begin()

    def selector_for(self, rows: int) -> DraftSelector:
        """The one that learns from batches of about so many rows; `selector` is the one for a single row."""
        return self.selector if rows == 1 else self._by_rows[power_of_two(rows)]

    def conversation(self, system: str | None = None) -> Conversation:
        """A chat that keeps its messages and its caches."""
        return Conversation(self, system)

    def _make_selector(self) -> DraftSelector:
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
            seconds=[self.costs.plain_seconds] * len(self.arms),
        )


def _load(source: Any, config: FlashSpecConfig, progress: Progress | None = None) -> LoadedModel:
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, LanguageModel):
        return LoadedModel(source, None, (), type(source).__name__)
    return load_model(source, device=config.device, dtype=config.dtype, progress=progress)


def _load_named(source: Any, config: FlashSpecConfig) -> tuple[LanguageModel, str]:
    loaded = _load(source, config)
    return loaded.model, loaded.name
