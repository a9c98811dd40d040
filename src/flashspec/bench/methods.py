"""What is compared: transformers in its ways, plain decoding, single arms, selectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from flashspec.bench.baselines import llama_twin
from flashspec.bench.widen import widened_model
from flashspec.config import BanditConfig, FlashSpecConfig, SamplingConfig
from flashspec.core import Arm, FlashSpecError, StepRecord
from flashspec.drafters import Drafter, list_drafters
from flashspec.drafters.heads import head_kind, is_head
from flashspec.drafters.shipped import shipped_heads
from flashspec.engine import SpeculativeEngine
from flashspec.engine.arms import BEST_HEADS, default_drafters, make_drafter
from flashspec.models.base import LanguageModel
from flashspec.models.loading import LoadedModel, hf_reference, load_model

SELECTORS = ("auto", "ucb1", "thompson")
HF_DTYPES = {"hf-float32": torch.float32, "hf-bfloat16": torch.bfloat16}
HF_METHODS = (*HF_DTYPES, "hf-compiled", "hf-lookup", "hf-assisted")
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Take:
    """One batch decoded once: each row's new tokens, the wall time from call to last token, our step records."""

    rows: tuple[tuple[int, ...], ...]
    seconds: float
    steps: tuple[StepRecord, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds


Method = Callable[[list[list[int]]], Take]  # a batch of prompt ids in


@dataclass(frozen=True, slots=True)
class Setup:
    """What every method of a run shares. drafters: as they were named. made: the models and heads among them, by the
    name. reference: the target as a transformers model in some dtype. room: tokens that the longest prompt and its
    answer take. arms: the methods of the run that are single arms."""

    drafters: tuple[str, ...]
    made: dict[str, Drafter]
    loaded: LoadedModel
    reference: Callable[[torch.dtype], Any]
    device: str
    dtype: Any
    max_new_tokens: int = 128
    temperature: float = 0.0
    room: int = 0
    arms: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        target: Any,
        drafters: Sequence[str] | None,
        device: str,
        dtype: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        progress: Progress | None = None,
        shape: str | None = None,
    ) -> Setup:
        """With a shape the target is the named model, widened to it, as its heads are. drafters None: the default."""
        if shape is None:
            loaded = load_model(target, device=device, dtype=dtype, progress=progress)
            drafters = default_drafters(loaded.model) if drafters is None else drafters
            setup = cls.of(loaded, drafters, device, dtype, cache(lambda kind: hf_reference(target, kind).to(device)))
        else:
            loaded, made = widened_model(target, shape, device, dtype, BEST_HEADS if drafters is None else drafters)
            drafters = [*default_drafters(loaded.model), *made] if drafters is None else drafters
            setup = cls.of(loaded, drafters, device, dtype, made=made)
        return replace(setup, max_new_tokens=max_new_tokens, temperature=temperature)

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        drafters: Sequence[str],
        device: str,
        dtype: str,
        reference: Callable[[torch.dtype], Any] | None = None,
        made: Mapping[str, Drafter] | None = None,
    ) -> Setup:
        """Around a target that is there, and drafters that may be."""
        ready, shipped = dict(made or {}), shipped_heads(loaded.model)
        for name in drafters:
            if name not in ready and (name not in list_drafters() or name in shipped or is_head(name)):
                ready[name] = make_drafter(name, loaded.model, partial(_load, device=device, dtype=dtype))
        reference = reference or cache(partial(llama_twin, loaded.model))
        return cls(tuple(drafters), ready, loaded, reference, device, dtype)

    def find(self, name: str) -> str:
        """The drafter that an arm's name means: as it was named, its last part, a head's kind, or a registered name.
        FlashSpecError where it means none, or several."""
        found = [one for one in self.drafters if name in _names(one)]
        if name in found or (not found and name in list_drafters()):
            return name
        if not found:
            raise FlashSpecError(f"drafter {name!r} is unknown: add --drafter with its id, folder or GGUF file")
        if len(found) > 1:
            raise FlashSpecError(f"drafter {name!r} may be any of {', '.join(found)}: name one of these in full")
        return found[0]

    def short(self, drafter: str) -> str:
        """The first of its names that no other drafter has."""
        others = {name for one in self.drafters if one != drafter for name in _names(one)}
        return next((name for name in _names(drafter) if name not in others), drafter)

    def drafter(self, name: str) -> Any:
        """What an engine takes for an arm's name, and calls by it."""
        found = self.find(name)
        if found not in self.made:
            return found  # an instance of its own for every engine
        drafter = copy(self.made[found])
        drafter.name = name
        return drafter


def _names(drafter: str) -> list[str]:
    """How an arm may call it, the shortest first."""
    return [name for name in (head_kind(drafter), Path(drafter).name, drafter) if name]


def is_arm(method: str) -> bool:
    return method == "plain" or ":" in method


def make_method(name: str, setup: Setup) -> Method:
    """FlashSpecError for a name that is none of hf-*, plain, an arm, a selector, a selector@arms.

    A selector has its usual arms, of the run's drafters: `auto` the default ones, the published ones a drafter each at
    gamma 4. With '@arms' it chooses among the methods of the run that are single arms."""
    on_gpu = setup.device.startswith("cuda")
    best = torch.bfloat16 if on_gpu else torch.float32
    if name in HF_DTYPES:
        return _hugging_face(setup, HF_DTYPES[name])
    if name == "hf-compiled":
        if not on_gpu:
            raise FlashSpecError("method 'hf-compiled' needs a GPU: transformers compiles its decoding for no other")
        return _hugging_face(setup, best, static=True)
    if name == "hf-lookup":
        return _hugging_face(setup, best, prompt_lookup_num_tokens=5)
    if name == "hf-assisted":
        return _hugging_face(setup, best, assistant_model=_assistant(setup, best))
    if name in SELECTORS:
        return _ours(_engine(setup, name, [setup.short(one) for one in setup.drafters], None), setup)
    if is_arm(name):
        return _ours(_engine_over(setup, "fixed", [name]), setup)
    selector, _, over = name.partition("@")
    if selector in SELECTORS and over == "arms":
        if not setup.arms:
            raise FlashSpecError(f"method {name!r} chooses among the arms of the run: name some, such as plain,ngram:4")
        return _ours(_engine_over(setup, selector, setup.arms), setup)
    known = ", ".join([*HF_METHODS, "plain", *SELECTORS])
    raise FlashSpecError(f"method {name!r} is unknown; there are {known}, each selector with @arms, and arms: ngram:4")


def _engine_over(setup: Setup, strategy: str, arms: Sequence[str]) -> SpeculativeEngine:
    names = dict.fromkeys(Arm.parse(arm).drafter for arm in arms if arm != "plain")
    return _engine(setup, strategy, list(names), arms)


def _engine(setup: Setup, strategy: str, drafters: Sequence[str], arms: Sequence[str] | None) -> SpeculativeEngine:
    config = FlashSpecConfig(
        device=setup.device,
        dtype=setup.dtype,
        max_new_tokens=setup.max_new_tokens,
        bandit=BanditConfig.model_validate({"strategy": strategy, "seed": 0}),
        sampling=SamplingConfig(temperature=setup.temperature, seed=0),
    )
    made = [setup.drafter(name) for name in drafters]
    return SpeculativeEngine.from_pretrained(setup.loaded, made, config=config, arms=arms)


def _load(source: Any, device: str, dtype: str) -> tuple[LanguageModel, str]:
    found = load_model(source, device=device, dtype=dtype)
    return found.model, found.name


def _ours(engine: SpeculativeEngine, setup: Setup) -> Method:
    def run(prompts: list[list[int]]) -> Take:
        started = time.perf_counter()
        result = engine.generate(prompts)
        seconds = time.perf_counter() - started
        rows = tuple(tuple(token_id for token_id in row if token_id >= 0) for row in result.output_ids.tolist())
        return Take(rows, seconds, tuple(result.steps))

    return run


def _assistant(setup: Setup, dtype: torch.dtype) -> Any:
    for drafter in setup.drafters:
        if is_head(drafter):
            continue
        try:
            return hf_reference(drafter, dtype).to(setup.device)
        except FlashSpecError:
            continue
    raise FlashSpecError("method 'hf-assisted' needs a model among the drafters: add --drafter ID, FOLDER or GGUF")


def _hugging_face(setup: Setup, dtype: torch.dtype, static: bool = False, **options: Any) -> Method:
    """static: over one static cache a batch size, emptied between calls, so that a compiled graph is never recorded
    again; on a GPU transformers then compiles its forward by inductor into CUDA graphs."""
    model = setup.reference(dtype)
    if setup.temperature:  # transformers' default cuts to 50 tokens
        options |= {"do_sample": True, "temperature": setup.temperature, "top_k": 0}
    else:
        options |= {"do_sample": False}
    eos = list(setup.loaded.eos_token_ids) or None
    caches: dict[int, Any] = {}

    @torch.inference_mode()
    def run(prompts: list[list[int]]) -> Take:
        longest = max(map(len, prompts))
        padding = eos[0] if eos else 0
        padded = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        cache = {"past_key_values": _emptied(caches, model, len(prompts), setup.room)} if static else {}
        torch.manual_seed(0)
        started = time.perf_counter()
        output = model.generate(
            torch.tensor(padded, device=setup.device),
            attention_mask=torch.tensor(mask, device=setup.device),
            max_new_tokens=setup.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=padding,
            **cache,
            **options,
        ).tolist()
        seconds = time.perf_counter() - started
        return Take(tuple(_until(row[longest:], eos or []) for row in output), seconds)

    return run


def _emptied(caches: dict[int, Any], model: Any, batch_size: int, room: int) -> Any:
    from transformers import StaticCache

    if batch_size in caches:
        caches[batch_size].reset()
    else:
        caches[batch_size] = StaticCache(config=model.config, max_cache_len=room)
    return caches[batch_size]


def _until(token_ids: list[int], stops: list[int]) -> tuple[int, ...]:
    """Up to the first stop token, inclusive: what follows is padding."""
    ends = [index for index, token_id in enumerate(token_ids) if token_id in stops]
    return tuple(token_ids[: ends[0] + 1] if ends else token_ids)
