"""Any `transformers` causal language model, on our cache and at our positions.

The adapter runs a private copy of the model's modules that shares the caller's weights, so that nothing it
sets (attention, evaluation mode, a shorter stack of layers) reaches the caller's model, and several threads
may call it. Weights changed in place are seen; a model moved or rebuilt afterwards wants a new adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.utils import ModelOutput

from flashspec.core import FlashSpecError
from flashspec.models.base import Features, KVCache, Vocabulary

_NAME = "per_row_positions"  # a name with "flash" in it would be taken for FlashAttention
_POSITIONS: ContextVar[Tensor] = ContextVar("positions")  # of the call in progress, (B, Q)
_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]  # of the keys, or the values, that a layer keeps
_UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")  # they change what is attended to


class HFModel:
    """A `LanguageModel` around a `transformers` causal LM; FlashSpecError where its architecture forbids it.

    Refused: encoder-decoders, attention outside `AttentionInterface`, and layers that keep anything but
    equally shaped keys and values (state-space, linear, latent or shared-cache attention). The constructor
    scores three tokens on our cache and compares with the model's own answer, to refuse what would run wrong.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        decoder: nn.Module = model.get_decoder()
        if model.config.is_encoder_decoder or decoder is model or not isinstance(decoder, PreTrainedModel):
            raise self._refusal("it has no decoder apart from its language-model head")
        self._lm_head = model.get_output_embeddings()
        self._weights: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
        self._head = copy.deepcopy(model, {**self._weights, id(decoder): _GivenHidden()}).eval()
        self._body = copy.deepcopy(decoder, dict(self._weights)).eval()
        self._truncated: dict[int, nn.Module] = {}
        self._config = self._body.config
        self._config.pad_token_id = None  # otherwise GPT-2 reads the ids back to warn about padding
        self._body.set_attn_implementation(_NAME)
        if self._config._attn_implementation != _NAME:
            raise self._refusal("its attention does not go through transformers' AttentionInterface")
        _freeze_rope(self._body)

        self.device: torch.device = model.device
        self.num_layers = int(self._config.num_hidden_layers)
        self.hidden_size = int(self._config.hidden_size)
        self.max_context = self._context_limit()
        self._try_out(copy.deepcopy(model, dict(self._weights)).eval())

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        shape = (self.num_layers, batch_size, self._kv_heads, capacity, self._head_dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return KVCache(keys, values)

    def vocabulary(self) -> Vocabulary:
        head = self._lm_head
        if not isinstance(head, nn.Linear):
            raise FlashSpecError(f"{self._name} has no LM head that a drafter could share")
        return Vocabulary(self._body.get_input_embeddings().weight.detach(), head.weight.detach())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        body = self._body if num_layers in (None, self.num_layers) else self._first_layers(num_layers)
        output = _run(body, token_ids, positions, _RowCache(cache, positions, bound), features is not None)
        if features is not None:
            for layer in features.layers:
                features.record(layer, positions, output.hidden_states[layer])
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        scores: Tensor = self._head(inputs_embeds=rows, use_cache=False).logits  # (1, N, V)
        return scores.float().reshape(*hidden.shape[:-1], -1)

    def _refusal(self, reason: str) -> FlashSpecError:
        return FlashSpecError(f"{self._name} cannot run on a cache with per-row positions: {reason}")

    def _context_limit(self) -> int:
        limit = getattr(self._config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            raise self._refusal(f"config.max_position_embeddings is {limit!r}, not the length of its longest text")
        rope = getattr(self._config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # a longer text turns all keys, also those cached, by other angles
            return min(limit, int(rope["original_max_position_embeddings"]))
        return limit

    def _try_out(self, model: PreTrainedModel) -> None:
        """Learn the shapes of cache and logits, then compare the score of three tokens with `model`'s."""
        model.set_attn_implementation("eager")  # the definition: `sdpa` of 5.17 leaves Gemma 2's soft-cap out
        probe = _ProbeCache()
        positions = torch.arange(3, device=self.device)[None]
        ids = positions + self._config.vocab_size // 2  # far from the padding tokens, which some models skip
        try:
            _run(self._body, ids, positions, probe)
            self._read_shapes(probe.seen)
            cache = self.new_cache(1, 3)
            self.forward(ids[:, :2], positions[:, :2], cache, 3)
            ours = self.logits(self.forward(ids[:, 2:], positions[:, 2:], cache, 3))[0, 0]
            with torch.no_grad():
                theirs = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        except FlashSpecError:
            raise
        except Exception as error:
            kind = f"{type(error).__name__}: {error}"
            raise self._refusal(f"a trial run failed, as where layers keep other state ({kind})") from error
        self.vocab_size = ours.shape[0]
        difference = ((ours - theirs).abs().max() / theirs.std()).item()
        # Measured on small models: rounding 1e-6 in float32 and 0.11 in bfloat16, ignored positions 0.37 and more.
        if not difference < (1e-3 if self.dtype == torch.float32 else 0.2):
            raise self._refusal(f"a trial run's logits are {difference:.2g} standard deviations off its own")

    def _read_shapes(self, seen: dict[int, tuple[_Kind, _Kind]]) -> None:
        if sorted(seen) != list(range(self.num_layers)):
            raise self._refusal(f"of its {self.num_layers} layers only {sorted(seen)} keep keys and values")
        kinds = {kind for pair in seen.values() for kind in pair}
        if len(kinds) != 1:
            raise self._refusal(f"its keys and values differ in kind: {sorted(map(str, kinds))}")
        (_, self._kv_heads, _, self._head_dim), self.dtype, _ = kinds.pop()

    def _first_layers(self, num_layers: int | None) -> nn.Module:
        if num_layers not in self._truncated:
            lists = [child for child in self._body.children() if isinstance(child, nn.ModuleList)]
            stacks = [child for child in lists if len(child) == self.num_layers]
            if len(stacks) != 1:
                raise self._refusal("its layers are not one list, so num_layers must be None")
            if num_layers is None or not 1 <= num_layers <= self.num_layers:
                raise FlashSpecError(f"num_layers is {num_layers}; {self._name} has 1 to {self.num_layers}")
            kept = nn.ModuleList(list(stacks[0])[:num_layers])
            self._truncated[num_layers] = copy.deepcopy(self._body, {**self._weights, id(stacks[0]): kept})
        return self._truncated[num_layers]


@torch.no_grad()
def _run(body: nn.Module, token_ids: Tensor, positions: Tensor, cache: Cache, every_layer: bool = False) -> Any:
    """Its output, with `last_hidden_state`, and with all `hidden_states` where asked."""
    token = _POSITIONS.set(positions)
    options = {"past_key_values": cache, "use_cache": True, "output_hidden_states": every_layer}
    try:
        return body(input_ids=token_ids, position_ids=positions, **options)
    finally:
        _POSITIONS.reset(token)


def _freeze_rope(body: nn.Module) -> None:
    """Up to `max_context` these kinds keep their first frequencies, yet would read back positions to know."""
    for module in body.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            vars(module)["rope_type"] = "default"
            module.register_buffer("inv_freq", module.get_buffer("original_inv_freq"), persistent=False)


class _RowCache(Cache):  # type: ignore[misc]
    """A KVCache for one call: writes at the call's positions, reads the slots below `bound`."""

    def __init__(self, cache: KVCache, positions: Tensor, bound: int) -> None:
        super().__init__(layers=[])
        self._cache, self._positions, self._bound = cache, positions, bound
        self._rows = torch.arange(positions.shape[0], device=positions.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """key_states, value_states: (B, kv_heads, Q, head_dim)."""
        keys, values = self._cache.keys[layer_idx], self._cache.values[layer_idx]
        keys.transpose(1, 2)[self._rows, self._positions] = key_states.transpose(1, 2)
        values.transpose(1, 2)[self._rows, self._positions] = value_states.transpose(1, 2)
        return keys[:, :, : self._bound], values[:, :, : self._bound]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._bound, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # the rows have no common length; only the masks ask, and ours go by the positions


class _ProbeCache(Cache):  # type: ignore[misc]
    """Holds nothing; notes what each layer wants kept."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen: dict[int, tuple[_Kind, _Kind]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        key_kind, value_kind = ((tuple(x.shape), x.dtype, x.device) for x in (key_states, value_states))
        self.seen[layer_idx] = key_kind, value_kind
        return key_states, value_states


@dataclass
class _Hidden(ModelOutput):  # type: ignore[misc]
    """What heads look for in a decoder's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


class _GivenHidden(nn.Module):
    """Stands where the decoder was, so that a model's own forward only turns hidden states into logits."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)


def _position_mask(
    batch_size: int, kv_length: int, mask_function: Callable[..., Tensor], device: torch.device, **_: Any
) -> Tensor:
    """The model's own rule (causal, sliding, chunked), asked at each row's positions: (B, 1, Q, S) bool."""
    positions = _POSITIONS.get()
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    slots = torch.arange(kv_length, device=device)
    heads = torch.zeros_like(rows)
    return mask_function(rows, heads, positions[:, None, :, None], slots)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query (B, H, Q, D), key and value (B, kv_heads, S, D), s_aux: sink scores (H,); gives (B, Q, H, D)."""
    given = [name for name in _UNSUPPORTED if extra.get(name) is not None]
    if given or attention_mask is None or attention_mask.dtype != torch.bool:
        reason = f"its {', '.join(given)}" if given else "a mask of its own"
        raise FlashSpecError(f"{type(module).__name__} attends by {reason}, which positions cannot express")
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # The query heads of a group share their keys: as extra query rows they need no copy of the cache.
    packed = query.reshape(batch, kv_heads, groups * length, -1)  # (B, kv_heads, G*Q, D)
    mask = attention_mask.repeat(1, 1, groups, 1)  # (B, 1, G*Q, S)
    if softcap is None and s_aux is None:
        mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = packed @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask, float("-inf"))
        if s_aux is not None:
            sinks = s_aux.to(scores.dtype).view(1, kv_heads, groups, 1).expand(batch, -1, -1, length)
            scores = torch.cat([scores, sinks.reshape(batch, kv_heads, -1, 1)], dim=-1)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]]
        mixed = probs.to(value.dtype) @ value
    return mixed.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _position_mask)
