"""What is compared: transformers in its ways, plain decoding, single arms, selectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashspec.config import BanditConfig, FlashSpecConfig, SamplingConfig
from flashspec.core import FlashSpecError, StepRecord
from flashspec.engine import SpeculativeEngine
from flashspec.models.loading import LoadedModel, hf_reference, load_model

SELECTORS = ("auto", "ucb1", "thompson")
HF_DTYPES = {"hf-float32": torch.float32, "hf-bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Take:
    """One prompt decoded once: the new tokens, the wall time from call to last token, our step records."""

    token_ids: tuple[int, ...]
    seconds: float
    steps: tuple[StepRecord, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


Method = Callable[[list[int]], Take]  # prompt ids in


@dataclass(frozen=True, slots=True)
class Setup:
    """What every method of a run shares."""

    target: Any
    drafters: tuple[str, ...]
    loaded: LoadedModel
    device: str
    dtype: Any
    max_new_tokens: int
    temperature: float

    @classmethod
    def load(
        cls,
        target: Any,
        drafters: Sequence[str],
        device: str,
        dtype: str,
        max_new_tokens: int,
        temperature: float,
        progress: Callable[[str, float | None], None] | None = None,
    ) -> Setup:
        loaded = load_model(target, device=device, dtype=dtype, progress=progress)
        return cls(target, tuple(drafters), loaded, device, dtype, max_new_tokens, temperature)


def make_method(name: str, setup: Setup) -> Method:
    """FlashSpecError for a name that is none of hf-*, plain, an arm, a selector."""
    if name in HF_DTYPES:
        return _hugging_face(setup, HF_DTYPES[name])
    if name == "hf-lookup":
        return _hugging_face(setup, torch.float32, prompt_lookup_num_tokens=5)
    if name == "hf-assisted":
        return _hugging_face(setup, torch.float32, assistant_model=_assistant(setup))
    if name in SELECTORS:
        return _selector(setup, name)
    if name == "plain" or ":" in name:
        return _ours(_engine(setup, "fixed", [name]), setup)
    known = [*HF_DTYPES, "hf-lookup", "hf-assisted", "plain", *SELECTORS]
    raise FlashSpecError(f"method {name!r} is unknown; there are {', '.join(known)}, and arms such as ngram:4")


def _selector(setup: Setup, strategy: str) -> Method:
    """The published selectors have one arm a drafter, at gamma 4; `auto` its own default arms."""
    return _ours(_engine(setup, strategy, None), setup)


def _engine(setup: Setup, strategy: str, arms: list[str] | None) -> SpeculativeEngine:
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
    def run(prompt: list[int]) -> Take:
        started = time.perf_counter()
        result = engine.generate([prompt])
        seconds = time.perf_counter() - started
        token_ids = tuple(token_id for token_id in result.output_ids[0].tolist() if token_id >= 0)
        return Take(token_ids, seconds, tuple(result.steps))

    return run


def _assistant(setup: Setup) -> Any:
    for drafter in setup.drafters:
        try:
            return hf_reference(drafter, torch.float32)
        except FlashSpecError:
            continue
    raise FlashSpecError("method 'hf-assisted' needs a model among the drafters: add --drafter ID, FOLDER or GGUF")


def _hugging_face(setup: Setup, dtype: torch.dtype, **options: Any) -> Method:
    model = hf_reference(setup.target, dtype).to(setup.device)
    sampling = {"do_sample": True, "temperature": setup.temperature} if setup.temperature else {"do_sample": False}
    eos = list(setup.loaded.eos_token_ids) or None

    @torch.inference_mode()
    def run(prompt: list[int]) -> Take:
        inputs = torch.tensor([prompt], device=setup.device)
        torch.manual_seed(0)
        started = time.perf_counter()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=setup.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
            **sampling,
            **options,
        )
        seconds = time.perf_counter() - started
        return Take(tuple(output[0, len(prompt) :].tolist()), seconds)

    return run
