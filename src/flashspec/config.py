"""Settings, validated once. Every error names the field, the value and what would be right."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Strategy = Literal["auto", "ucb1", "thompson", "oracle", "fixed"]
Variant = Literal["rejection", "coupled", "typical"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingConfig(_Config):
    """How tokens are drawn from the target's distribution.

    gamma: draft tokens a step where an arm does not say otherwise. temperature 0 is greedy. top_k 0 or -1, top_p 1,
    min_p 0 and penalties of 1, 0, 0 are off; the repetition penalty sees prompt and output, presence and frequency
    the output. logit_bias: token id -> added to its logit. seed None draws a fresh one for every call. Transforms act
    in the order bias, min_tokens, penalties, temperature, top-k, top-p, min-p, at every draft position.
    variant: `rejection` and `coupled` are exact, `typical` is not (typical_epsilon, typical_delta are its thresholds).
    logprobs: None, or how many most likely tokens to report beside each emitted one.
    """

    gamma: int = Field(4, ge=1, le=64)
    temperature: Finite = Field(1.0, ge=0.0)
    top_k: int = Field(0, ge=-1)
    top_p: Finite = Field(1.0, gt=0.0, le=1.0)
    min_p: Finite = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100.0)
    presence_penalty: Finite = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: Finite = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, Annotated[Finite, Field(ge=-1e4, le=1e4)]] = Field(default_factory=dict)
    min_tokens: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=0, lt=2**63)
    variant: Variant = "rejection"
    typical_epsilon: Finite = Field(0.09, gt=0.0, le=1.0)
    typical_delta: Finite = Field(0.3, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _stops_are_not_empty(self) -> SamplingConfig:
        if "" in self.stop:
            raise ValueError("stop holds an empty string; every stop string needs at least one character")
        return self


class BanditConfig(_Config):
    """Which arm next. n_arms None: as many as the engine has. window_size, in steps: 0 is all history; `auto`
    forgets after a hundred at the latest."""

    strategy: Strategy = "auto"
    n_arms: int | None = Field(None, ge=1)
    window_size: int = Field(500, ge=0)
    ucb_exploration_constant: Finite = Field(1.0, ge=0.0)
    thompson_prior_alpha: Finite = Field(1.0, gt=0.0)
    thompson_prior_beta: Finite = Field(1.0, gt=0.0)
    true_rates: tuple[float, ...] | None = None
    seed: int | None = Field(None, ge=0)


class MetricsConfig(_Config):
    """Which trackers an engine keeps; latency_window is in steps."""

    track_acceptance: bool = True
    track_throughput: bool = True
    track_latency: bool = True
    latency_window: int = Field(1000, ge=1)


@functools.cache
def gpu_fault() -> str:
    """What keeps a torch that is built for CUDA from the GPUs of this machine; '' where nothing does."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words for it
        if torch.version.cuda is None or torch.cuda.is_available():
            return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        if reason != "No CUDA GPUs are available":
            return (
                f"torch is built for CUDA {torch.version.cuda}, but {reason[0].lower()}{reason[1:]}: "
                "install the latest NVIDIA driver, or from pytorch.org a torch that suits this machine"
            )
    return ""


@functools.cache
def default_device() -> str:
    """The first GPU, else the CPU; where a GPU cannot be used a warning says why, once."""
    import torch

    fault = gpu_fault()
    if fault and "no NVIDIA driver" not in fault:  # which a machine without a GPU need not have
        warnings.warn(f"the CPU is used: {fault}", RuntimeWarning, stacklevel=2)
    return "cuda:0" if torch.cuda.is_available() else "cpu"


class FlashSpecConfig(_Config):
    """An engine's settings. Names are hub ids, folders or GGUF files; dtype 'auto' is what suits the device."""

    target_name: str | None = None
    drafter_name: str | None = None
    device: str = Field(default_factory=default_device)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_new_tokens: int = Field(256, ge=1)
    bandit: BanditConfig = BanditConfig()
    sampling: SamplingConfig = SamplingConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _device_is_known(self) -> FlashSpecConfig:
        check_device_name(self.device)
        return self


def check_device_name(device: str) -> None:
    """ValueError where it can name none."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device is {device!r}; it should be 'cpu', 'cuda' or 'cuda:N'")


def explain(error: ValidationError) -> str:
    """A validation error as one sentence."""
    parts = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field} is {item['input']!r}: {message[0].lower()}{message[1:]}" if field else message)
    return "; ".join(parts)
