"""The engine inside transformers: `model.generate(**inputs, custom_generate=speculative_generate(["suffix"]))`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import Arm, FlashSpecError
from flashspec.engine.arms import listed
from flashspec.engine.engine import SpeculativeEngine
from flashspec.engine.output import Chunk

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
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_ENGINES: WeakKeyDictionary[Any, tuple[object, SpeculativeEngine]] = WeakKeyDictionary()  # a model's last engine


def speculative_generate(
    drafters: Sequence[Any] = ("suffix",),
    *,
    arms: Sequence[Arm | str] | None = None,
    load: Callable[[Any], Any] | None = None,
    streamer: Any = None,
) -> Callable[..., Tensor]:
    """A `custom_generate` that writes what `generate` would, by a `SpeculativeEngine` with these drafters and arms.

    load: makes the engine's target of the model. None shares its weights, so that later changes to them count;
    `flashspec.models.loading.load_model` copies them once, into a decoder that is faster where it knows the model.
    streamer: a transformers one, for one prompt; it belongs here, since `generate` hands on neither its own `streamer`
    nor its `assistant_model`. Draws follow torch's CPU generator. ValueError for what cannot be honoured exactly.
    """
    recipe = tuple(listed(drafters)), None if arms is None else tuple(listed(arms)), load

    def generate(
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        kept = _prompt_mask(input_ids, model_kwargs)
        prompts = [ids[mask].tolist() for ids, mask in zip(input_ids, kept, strict=True)]
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer follows one prompt, and this batch has {len(prompts)}")
        max_length, stop_ids = _end(stopping_criteria)
        settings = _settings(generation_config, logits_processor, kept, stop_ids)
        sampling = SamplingConfig(**settings, stop_token_ids=stop_ids, ignore_eos=True)
        engine = _engine(model, *recipe)
        max_new_tokens = max_length - input_ids.shape[1]
        room = engine.target.max_context - max(map(len, prompts))
        if max_new_tokens > room:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; the model's context has room for {room} more")

        generation = engine.stream(prompts, max_new_tokens, sampling=sampling)
        _follow(generation, input_ids, streamer)
        result = generation.result()
        if "error" in result.finish_reasons:
            raise FlashSpecError(f"row {result.finish_reasons.index('error')} met logits that are not finite")
        named = generation_config.pad_token_id
        padding = next(iter(stop_ids), 0) if named is None else named
        output = result.output_ids.masked_fill(result.output_ids < 0, padding)  # (B, longest)
        return torch.cat([input_ids, output.to(input_ids)], 1)

    return generate


def _follow(chunks: Iterable[Chunk], input_ids: Tensor, streamer: Any) -> None:
    """Decode to the end, and tell a streamer as `generate` would: the prompt, then token by token."""
    if streamer is None:
        deque(chunks, maxlen=0)
        return
    streamer.put(input_ids.cpu())
    for chunk in chunks:
        for token_id in chunk.token_ids:
            streamer.put(torch.tensor([token_id]))
    streamer.end()


def _engine(model: Any, drafters: Sequence[Any], arms: Sequence[Arm | str] | None, load: Any) -> SpeculativeEngine:
    """The model's last engine, or a new one where it was moved or has other parameters since."""
    key = drafters, arms, load, model.device, model.dtype, frozenset(map(id, model.parameters()))
    if model not in _ENGINES or _ENGINES[model][0] != key:
        from flashspec.models.hf import HFModel  # brings transformers with it

        config = FlashSpecConfig(device=str(model.device))
        engine = SpeculativeEngine.from_pretrained((load or HFModel)(model), drafters, config=config, arms=arms)
        _ENGINES[model] = key, engine
    return _ENGINES[model][1]


def _prompt_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """(B, T) bool, false on a row's padding, which must be on its left."""
    others = sorted(name for name, value in model_kwargs.items() if name not in _KNOWN and value is not None)
    if others:
        raise ValueError(f"{', '.join(others)} is not supported: give input_ids and attention_mask only")
    cache, mask, positions = map(model_kwargs.get, ("past_key_values", "attention_mask", "position_ids"))
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values is not empty; leave it out, and give the whole text as input_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if (kept[:, :-1] & ~kept[:, 1:]).any():
        raise ValueError("attention_mask has zeros behind ones; pad prompts on the left")
    if positions is not None and ((positions != kept.cumsum(1) - 1) & kept).any():
        raise ValueError("position_ids do not count a prompt's tokens from 0; leave them out")
    return kept


def _end(criteria: Sequence[Any]) -> tuple[int, tuple[int, ...]]:
    """The length at which every row ends, its padding included, and the stop tokens."""
    known = {type(criterion).__name__: criterion for criterion in criteria}
    if known.keys() - {"MaxLengthCriteria", "EosTokenCriteria"} or len(known) < len(criteria):
        raise ValueError(f"stopping criteria {list(known)} are not supported; name a length and eos_token_id")
    eos = known.get("EosTokenCriteria")
    return known["MaxLengthCriteria"].max_length, () if eos is None else tuple(eos.eos_token_id.tolist())


def _settings(config: Any, processors: Sequence[Any], kept: Tensor, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """What the mode and the processors ask for, as fields of SamplingConfig."""
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample") or config.return_dict_in_generate:
        what = "return_dict_in_generate" if config.return_dict_in_generate else f"generation mode {mode.value!r}"
        raise ValueError(f"{what} is not supported: ask for greedy decoding or sampling, and for token ids")
    names = [type(processor).__name__ for processor in processors]
    if names != [name for name in _PROCESSORS if name in names]:
        raise ValueError(f"logits processors {names} are not supported, but {list(_PROCESSORS)} in this order")
    settings: dict[str, Any] = {}
    for name, processor in zip(names, processors, strict=True):
        attribute, field = _PROCESSORS[name]
        value = getattr(processor, attribute)
        if field == "repetition_penalty":
            ignored = processor.prompt_ignore_length  # None, or tokens of all rows, or of each
            if ((~kept).sum(1) != (0 if ignored is None else ignored)).any():
                raise ValueError("repetition_penalty counts padding or skips a prompt here: pass prompts one by one")
        elif field == "min_tokens":
            if tuple(processor.eos_token_id.tolist()) != stop_ids:
                raise ValueError(f"{name} holds back other tokens than the stop tokens {stop_ids}")
            new_tokens = value - kept.shape[1] if attribute == "min_length" else value
            value = max(settings.get(field, 0), new_tokens)
        settings[field] = value
    if not config.do_sample:
        return settings | {"temperature": 0.0}
    # Coupled: one seed, one text, whichever arms the selector took.
    return settings | {"variant": "coupled", "seed": int(torch.randint(2**63 - 1, ()))}
