"""The parts of a step, timed one by one: forwards by width, whole steps by arm, transformers' forwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import sub
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashspec.bench.baselines import StaticForward
from flashspec.bench.shapes import step_bytes
from flashspec.bench.timing import Timer
from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import Arm, StepRecord
from flashspec.drafters import Drafter
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.engine import SpeculativeEngine
from flashspec.engine.state import DecodeState
from flashspec.models.base import LanguageModel
from flashspec.models.decoder import Decoder
from flashspec.models.loading import LoadedModel
from flashspec.sampling.sampler import make_sampler

Row = dict[str, Any]


class Clocked:
    """A model that adds up the seconds of forwards whose logits are asked for: a prefill's are not."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._forward = 0.0
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        started = time.perf_counter()
        hidden = self._model.forward(*arguments, **options)
        self._forward = time.perf_counter() - started
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        logits = self._model.logits(hidden)
        self.seconds += self._forward + time.perf_counter() - started
        self._forward = 0.0
        return logits


@dataclass(slots=True)
class Bench:
    """One run's target and how it is measured.

    timer captures on a GPU, clock never does; bandwidth in bytes a second; context: tokens in the cache; new_tokens:
    the answer's length where whole steps are timed. forwards: microseconds of the target's, by (batch size, width)."""

    target: LoadedModel
    device: str
    timer: Timer
    clock: Timer
    calls: int
    bandwidth: float
    context: int
    new_tokens: int
    temperature: float
    forwards: dict[tuple[int, int], float] = field(default_factory=dict)

    def forward(self, batch_size: int, width: int, drafter: ModelDrafter | None = None) -> Row:
        """`width` tokens a row through all layers and the LM head of the target, or of a draft model; over the target's
        forward of one token, where that was measured."""
        model = self.target.model if drafter is None else drafter.model
        call = self._forward(model, batch_size, width)
        taken, spread = self.timer(lambda index: call())
        if drafter is None:
            self.forwards[batch_size, width] = taken
        plain = self.forwards.get((batch_size, 1))
        return {
            "part": "forward" if drafter is None else "drafter",
            "method": "flashspec",
            "arm": None if drafter is None else drafter.name,
            "batch_size": batch_size,
            "width": width,
            **self._cost(model, taken, spread),
            "over_plain": round(taken / plain, 3) if plain else None,
        }

    def baseline(self, method: str, twin: Any, batch_size: int, width: int) -> Row:
        """The same forward by transformers over a static cache: 'transformers-eager', '-graph' or '-compiled'."""
        forward = StaticForward.make(
            twin, batch_size, width, self.context, self.calls, compiled=method.endswith("compiled")
        )
        timer = self.clock if method.endswith("eager") else self.timer
        taken, spread = timer(forward, forward.rewind)
        return {
            "part": "forward",
            "method": method,
            "batch_size": batch_size,
            "width": width,
            **self._cost(self.target.model, taken, spread),
        }

    def step(self, arm: Arm, drafter: Any, batch_size: int) -> Row:
        """A step as the engine runs it, the median over the second half of an answer to random tokens. The rest is what
        it takes beyond its forwards, an early exit's among them: lookup, acceptance, commit, gaps; of a head all that
        it does, which `draft` times.

        On a CPU forwards are timed where they are called, as they vary by more than the rest takes."""
        seconds, inside = self._step_seconds(arm, drafter, batch_size)
        middle = len(seconds) // 2
        first, second = (1e6 * median(half) for half in (seconds[:middle] or seconds, seconds[middle:]))
        if inside:
            forwards: float | None = 1e6 * median(inside[middle:])
            rest: float | None = 1e6 * median(map(sub, seconds[middle:], inside[middle:]))
        else:
            forwards = self._forwards(arm, drafter, batch_size)
            rest = None if forwards is None else second - forwards
        return {
            "part": "step",
            "method": "flashspec",
            "arm": str(arm),
            "batch_size": batch_size,
            "width": arm.length + 1,
            "microseconds": round(second, 3),
            "spread": round(abs(second - first), 3),
            "forward_microseconds": None if forwards is None else round(forwards, 3),
            "rest_microseconds": None if rest is None else round(rest, 3),
        }

    def _forward(
        self, model: LanguageModel, batch_size: int, width: int, num_layers: int | None = None
    ) -> Callable[[], Tensor]:
        cache = model.new_cache(batch_size, self.context)
        token_ids = torch.zeros(batch_size, width, dtype=torch.int64, device=model.device)
        places = torch.arange(self.context - width, self.context, device=model.device)
        positions = places.expand(batch_size, -1).contiguous()

        @torch.inference_mode()
        def forward() -> Tensor:
            return model.logits(model.forward(token_ids, positions, cache, self.context, num_layers))

        return forward

    def _forwards(self, arm: Arm, drafter: Any, batch_size: int) -> float | None:
        """Microseconds of a step's forwards, one behind the other: a small draft model alone would find weights in the
        GPU's cache that the target's push out in a step. None where none but the target's is, and was not measured."""
        model, drafts = self.target.model, list[Callable[[], Tensor]]()
        if arm.drafter == EarlyExitDrafter.name:
            drafts = [self._forward(model, batch_size, 1, EarlyExitDrafter.create(model).num_layers)] * arm.length
        elif isinstance(drafter, ModelDrafter):  # which reads two tokens first
            first, later = (self._forward(drafter.model, batch_size, width) for width in (2, 1))
            drafts = [first] + [later] * (arm.length - 1)
        if not drafts:
            return self.forwards.get((batch_size, arm.length + 1))
        forwards = [*drafts, self._forward(model, batch_size, arm.length + 1)]
        return self.timer(lambda index: [forward() for forward in forwards])[0]

    def draft(self, arm: Arm, drafter: Drafter, batch_size: int) -> Row:
        """What it takes to draft, all but catching up: one launch on a GPU."""
        model, prompts = self.target.model, self._prompts(batch_size).tolist()
        config = SamplingConfig(temperature=self.temperature, seed=0)
        sampler = make_sampler(config, prompts, [], model.vocab_size, 0, model.device)
        state = DecodeState.create(prompts, [self.context] * batch_size, [], model, sampler)
        with torch.inference_mode():
            proposer = drafter.start(state)
            state.prepare()
            proposer.prepare(state)
        state.bound = state.capacity  # as graphs have it

        @torch.inference_mode()
        def call(index: int) -> Any:
            return proposer.propose(state, arm.length).token_ids

        taken, spread = self.timer(call)
        row = {"part": "draft", "method": "flashspec", "arm": str(arm), "batch_size": batch_size, "width": arm.length}
        return row | {"microseconds": taken, "spread": spread}

    def _prompts(self, batch_size: int) -> Tensor:
        """Random tokens that leave room for an answer."""
        shape = (batch_size, self.context - self.new_tokens)
        return torch.randint(self.target.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def _step_seconds(self, arm: Arm, drafter: Any, batch_size: int) -> tuple[list[float], list[float]]:
        """Of every step of all rows; and, on a CPU, what each spends in forwards."""
        config = FlashSpecConfig(
            device=self.device,
            max_new_tokens=self.new_tokens,
            sampling=SamplingConfig(temperature=self.temperature, seed=0, ignore_eos=True),
        )
        target, models = self.target, list[Clocked]()
        if target.model.device.type == "cpu":
            models.append(Clocked(target.model))
            target = replace(target, model=models[0])
            if isinstance(drafter, ModelDrafter):
                models.append(Clocked(drafter.model))
                drafter = ModelDrafter(models[1], drafter.name, drafter.part)
        engine = SpeculativeEngine.from_pretrained(target, [drafter] if arm.length else [], config=config, arms=[arm])
        prompts = self._prompts(batch_size)
        engine.generate(prompts)  # captures, and warms up
        steps, spent = list[StepRecord](), [sum(model.seconds for model in models)]
        for step in engine.stream(prompts).records():
            steps.append(step)
            spent.append(sum(model.seconds for model in models))
        whole = [index for index, step in enumerate(steps) if len(step.rows) == batch_size]
        inside = [spent[index + 1] - spent[index] for index in whole] if models else []
        return [steps[index].seconds for index in whole], inside

    def _cost(self, model: LanguageModel, taken: float, spread: float) -> Row:
        n_bytes = step_bytes(model.config, model.dtype) if isinstance(model, Decoder) else None
        mbu = round(n_bytes / taken * 1e6 / self.bandwidth, 3) if n_bytes else None
        return {"microseconds": taken, "spread": spread, "bytes": n_bytes, "mbu": mbu}
