"""What is compared: transformers in its ways, plain decoding, single arms, selectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from flashspec.bench.baselines import llama_twin
from flashspec.bench.widen import widened_model
from flashspec.config import BanditConfig, FlashSpecConfig, SamplingConfig
from flashspec.core import FlashSpecError, StepRecord
from flashspec.engine import SpeculativeEngine
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
    """What every method of a run shares. reference: the target as a transformers model in some dtype. room: tokens that
    the longest prompt and its answer take."""

    drafters: tuple[str, ...]
    loaded: LoadedModel
    reference: Callable[[torch.dtype], Any]
    device: str
    dtype: Any
    max_new_tokens: int
    temperature: float
    room: int = 0

    @classmethod
    def load(
        cls,
        target: Any,
        drafters: Sequence[str],
        device: str,
        dtype: str,
        max_new_tokens: int,
        temperature: float,
        progress: Progress | None = None,
        shape: str | None = None,
    ) -> Setup:
        """With a shape the target is the named model, widened to it."""
        if shape is None:
            loaded = load_model(target, device=device, dtype=dtype, progress=progress)
            reference = cache(lambda kind: hf_reference(target, kind).to(device))
        else:
            loaded = widened_model(target, shape, device, dtype)
            reference = cache(partial(llama_twin, loaded.model))
        return cls(tuple(drafters), loaded, reference, device, dtype, max_new_tokens, temperature)


def make_method(name: str, setup: Setup) -> Method:
    """FlashSpecError for a name that is none of hf-*, plain, an arm, a selector."""
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
        return _ours(_engine(setup, name, None), setup)
    if name == "plain" or ":" in name:
        return _ours(_engine(setup, "fixed", [name]), setup)
    known = ", ".join([*HF_METHODS, "plain", *SELECTORS])
    raise FlashSpecError(f"method {name!r} is unknown; there are {known}, and arms such as ngram:4")


def _engine(setup: Setup, strategy: str, arms: list[str] | None) -> SpeculativeEngine:
    """arms None: the published selectors have one arm a drafter, at gamma 4; `auto` its own default arms."""
    config = FlashSpecConfig(
        device=setup.device,
        dtype=setup.dtype,
        max_new_tokens=setup.max_new_tokens,
        bandit=BanditConfig.model_validate({"strategy": strategy, "seed": 0}),
        sampling=SamplingConfig(temperature=setup.temperature, seed=0),
    )
    drafters = setup.drafters if arms is None or arms == ["plain"] else [arms[0].rpartition(":")[0]]
    named = [next((d for d in setup.drafters if d.endswith(name)), name) for name in drafters]
    return SpeculativeEngine.from_pretrained(setup.loaded, named, config=config, arms=arms)


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
