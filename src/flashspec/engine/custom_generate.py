"""The engine inside transformers: `model.generate(**inputs, custom_generate=speculative_generate(["suffix"]))`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import Arm, FlashSpecError
from flashspec.engine.engine import SpeculativeEngine

# A transformers processor -> the attribute that holds its setting, and our name for it; both apply them in this order.
_PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "MinLengthLogitsProcessor": ("min_length", "min_tokens"),
    "MinNewTokensLengthLogitsProcessor": ("min_new_tokens", "min_tokens"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
}
_IGNORED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_ENGINES: WeakKeyDictionary[Any, tuple[object, SpeculativeEngine]] = WeakKeyDictionary()  # a model's last engine


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def speculative_generate(
    drafters: Sequence[Any] = ("suffix",),
    *,
    arms: Sequence[Arm | str] | None = None,
    load: Callable[[Any], Any] | None = None,
    streamer: Streamer | None = None,
) -> Callable[..., Tensor]:
    """A `custom_generate` that writes what `generate` would, with a `SpeculativeEngine` of these drafters and arms.

    load: makes the engine's target of the model. None shares its weights, so that later changes to them count;
    `flashspec.models.loading.load_model` copies them once into a decoder that is faster where it knows the model.
    streamer: for one prompt; it belongs here, since `generate` does not hand on its own `streamer` (nor its
    `assistant_model`). Draws follow torch's CPU generator. What cannot be honoured exactly is a ValueError.
    """
    chosen_drafters, chosen_arms = tuple(drafters), tuple(arms) if arms is not None else None

    def generate(
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        _refuse_modes(generation_config)
        mask = _prompt_mask(input_ids, model_kwargs)
        prompts = [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer follows one prompt, and generate was given {len(prompts)}")
        max_length, stop_ids = _end(stopping_criteria)
        settings = _settings(logits_processor, input_ids.shape[1], stop_ids, (~mask).sum(1).tolist())
        if generation_config.do_sample:
            settings = {"seed": int(torch.randint(2**63 - 1, ())), **settings}
        else:
            settings["temperature"] = 0.0
        engine = _engine(model, chosen_drafters, chosen_arms, load)
        max_new_tokens = max_length - input_ids.shape[1]
        room = engine.target.max_context - max(map(len, prompts))
        if max_new_tokens > room:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; the model's context has room for {room} more")

        sampling = SamplingConfig(**settings, stop_token_ids=stop_ids, ignore_eos=True)
        generation = engine.stream(prompts, max_new_tokens, sampling=sampling)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for chunk in generation:
            if streamer is not None:
                for token_id in chunk.token_ids:
                    streamer.put(torch.tensor([token_id]))
        if streamer is not None:
            streamer.end()
        result = generation.result()
        if "error" in result.finish_reasons:
            raise FlashSpecError(f"row {result.finish_reasons.index('error')} met logits that are not finite")
        pad_id = generation_config.pad_token_id
        padding = pad_id if pad_id is not None else next(iter(stop_ids), 0)
        output = result.output_ids.masked_fill(result.output_ids < 0, padding)  # (B, longest)
        return torch.cat([input_ids, output.to(input_ids)], 1)

    return generate


def _engine(model: Any, drafters: tuple[Any, ...], arms: tuple[Arm | str, ...] | None, load: Any) -> SpeculativeEngine:
    """A new one where the model was moved or has other parameters since."""
    key = drafters, arms, load, model.device, model.dtype, frozenset(map(id, model.parameters()))
    if model not in _ENGINES or _ENGINES[model][0] != key:
        from flashspec.models.hf import HFModel  # brings transformers with it

        config = FlashSpecConfig(device=str(model.device))
        target = (load or HFModel)(model)
        _ENGINES[model] = key, SpeculativeEngine.from_pretrained(target, drafters, config=config, arms=arms)
    return _ENGINES[model][1]


def _refuse_modes(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"generation mode {mode.value!r} is not supported: use greedy decoding or sampling")
    if config.return_dict_in_generate:
        raise ValueError("return_dict_in_generate is not supported: ask for token ids")


def _prompt_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """(B, T) bool, false on a row's padding, which must be on its left."""
    others = sorted(name for name, value in model_kwargs.items() if name not in _IGNORED and value is not None)
    if others:
        raise ValueError(f"{', '.join(others)} cannot be passed on: give input_ids and attention_mask only")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values is not empty; leave it out, and give the whole text as input_ids")
    mask = model_kwargs.get("attention_mask")
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if (kept[:, :-1] & ~kept[:, 1:]).any():
        raise ValueError("attention_mask has zeros behind ones; pad prompts on the left")
    positions = model_kwargs.get("position_ids")
    if positions is not None and ((positions != kept.cumsum(1) - 1) & kept).any():
        raise ValueError("position_ids do not count a prompt's tokens from 0; leave them out")
    return kept


def _end(criteria: Sequence[Any]) -> tuple[int, tuple[int, ...]]:
    """The length at which all rows end, padding included, and the stop tokens."""
    known = {type(criterion).__name__: criterion for criterion in criteria}
    others = sorted(known.keys() - {"MaxLengthCriteria", "EosTokenCriteria"})
    if others or len(known) < len(criteria):
        raise ValueError(f"stopping criteria {others or list(known)} are not supported, but eos_token_id and a length")
    eos = known.get("EosTokenCriteria")
    return known["MaxLengthCriteria"].max_length, tuple(eos.eos_token_id.tolist()) if eos is not None else ()


def _settings(
    processors: Sequence[Any], width: int, stop_ids: tuple[int, ...], padding: list[int]
) -> dict[str, Any]:
    """What the processors do, as fields of SamplingConfig."""
    names = [type(processor).__name__ for processor in processors]
    if [name for name in _PROCESSORS if name in names] != names:
        raise ValueError(f"logits processors {names} are not supported; those that are, in order: {list(_PROCESSORS)}")
    settings: dict[str, Any] = {}
    for processor, name in zip(processors, names, strict=True):
        attribute, field = _PROCESSORS[name]
        value = getattr(processor, attribute)
        if field == "repetition_penalty":
            ignored = processor.prompt_ignore_length  # None, how many of all rows, or (B,)
            if padding != (ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(padding)):
                raise ValueError("repetition_penalty counts padding, or leaves a prompt out: pass single prompts")
        elif field == "min_tokens":
            if tuple(processor.eos_token_id.tolist()) != stop_ids:
                raise ValueError(f"{name} holds back other tokens than those that end a row, {stop_ids}")
            value = max(settings.get(field, 0), value - width if attribute == "min_length" else value, 0)
        settings[field] = value
    return settings
