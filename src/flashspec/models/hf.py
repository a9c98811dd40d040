"""Any `transformers` causal language model, on our cache and at our positions.

The adapter runs a private copy of the model's modules that shares the caller's weights, so that nothing it
sets (attention, evaluation mode, a shorter stack of layers) reaches the caller's model, and several threads
may call it. Weights changed in place are seen; a model moved or rebuilt afterwards wants a new adapter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.utils import ModelOutput

from flashspec.core import FlashSpecError
from flashspec.kernels import decoding
from flashspec.kernels.decoding import MOST_QUERIES, MOST_ROWS_AND_QUERIES
from flashspec.models.base import Features, KVCache, Sample, Vocabulary

_NAME = "per_row_positions"  # a name with "flash" in it would be taken for FlashAttention
_CALL: ContextVar[_Call] = ContextVar("call in progress")
_Rule = Callable[..., Tensor]  # of (row, head, position, slot): whether the slot is seen
_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]  # of the keys, or the values, that a layer keeps
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks")  # they change what is attended to


class HFModel:
    """A `LanguageModel` around a `transformers` causal LM; FlashSpecError where its architecture forbids it.

    Refused: encoder-decoders, attention outside `AttentionInterface`, and layers that keep anything but
    equally shaped keys and values (state-space, linear, latent or shared-cache attention). The constructor
    scores three tokens on our cache and compares with the model's own answer, to refuse what would run wrong.

    On a GPU, few tokens attend through our kernel if every layer sees all earlier tokens, or the last so many.
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
        self._windows: tuple[int | None, ...] = ()  # of each layer, where our kernel may attend
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
        if not isinstance(self._lm_head, nn.Linear):
            raise FlashSpecError(f"{self._name} has no LM head that a drafter could share")
        return Vocabulary(self._body.get_input_embeddings().weight.detach(), self._lm_head.weight.detach())

    @torch.no_grad()
    def sample(self) -> Sample:
        embedding, parameters = self._body.get_input_embeddings().weight, list(self._body.parameters())
        norms = [x for x in parameters if x.dim() == 1] or [embedding[0]]  # OLMo's learn nothing
        return Sample.of(norms[-1], embedding, [x for x in parameters if x.dim() == 2 and x is not embedding])

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
        few = self._windows and 0 < token_ids.numel() <= MOST_ROWS_AND_QUERIES and token_ids.shape[1] <= MOST_QUERIES
        call = _KernelCache(cache, positions, self._windows) if few else _RowCache(cache, positions, bound)
        output = _run(body, token_ids, call, features is not None)
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
        ids = torch.arange(3, device=self.device)[None] + self._config.vocab_size // 2  # not those that pad
        probe = _ProbeCache(torch.arange(3, device=self.device)[None])
        try:
            _run(self._body, ids, probe)
            self._read_shapes(probe.seen)
            with torch.no_grad():
                theirs = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            difference = self._difference(ids, theirs)
        except FlashSpecError:
            raise
        except Exception as error:
            kind = f"{type(error).__name__}: {error}"
            raise self._refusal(f"a trial run failed, as where layers keep other state ({kind})") from error
        self.vocab_size = theirs.shape[0]
        if not difference < self._rounding:
            raise self._refusal(f"a trial run's logits are {difference:.2g} standard deviations off its own")
        self._choose_kernel(probe, ids, theirs)

    def _choose_kernel(self, probe: _ProbeCache, ids: Tensor, theirs: Tensor) -> None:
        """Let our kernel attend if it can express every layer, and if its trial run is right too."""
        fits = self.dtype in _KERNEL_DTYPES and self._head_dim % 16 == 0 and self._head_dim <= 256
        if not decoding.available(self.device) or not fits:
            return
        rules = [probe.rules.get(layer) for layer in range(self.num_layers)]
        asked = {rule: _slots_seen(rule, self.max_context, ids.device) for rule in set(rules)}  # layers share them
        if 0 in asked.values():
            return
        self._windows = tuple(None if asked[rule] == self.max_context else asked[rule] for rule in rules)
        try:
            difference = self._difference(ids, theirs)
            reason = f"its logits are {difference:.2g} standard deviations off"
        except Exception as error:
            difference, reason = float("inf"), f"{type(error).__name__}: {error}"
        if not difference < self._rounding:
            self._windows = ()
            failure = f"our kernel failed its trial run ({reason})"
            warnings.warn(f"{self._name} attends through PyTorch, which is slower: {failure}", stacklevel=2)

    def _difference(self, ids: Tensor, theirs: Tensor) -> float:
        """Of our logits for the last of three tokens from `theirs`, in standard deviations of the latter."""
        cache, positions = self.new_cache(1, 3), torch.arange(3, device=ids.device)[None]
        self.forward(ids[:, :2], positions[:, :2], cache, 3)
        ours = self.logits(self.forward(ids[:, 2:], positions[:, 2:], cache, 3))[0, 0]
        return float((ours - theirs).abs().max() / theirs.std())

    @property
    def _rounding(self) -> float:
        # Measured on small models: rounding 1e-6 in float32 and 0.11 in bfloat16, ignored positions 0.37 and more.
        return 1e-3 if self.dtype == torch.float32 else 0.2

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
def _run(body: nn.Module, token_ids: Tensor, call: _Call, every_layer: bool = False) -> Any:
    """Its output, with `last_hidden_state`, and with all `hidden_states` where asked."""
    token = _CALL.set(call)
    options = {"past_key_values": call, "use_cache": True, "output_hidden_states": every_layer}
    try:
        return body(input_ids=token_ids, position_ids=call.positions, **options)
    finally:
        _CALL.reset(token)


def _slots_seen(rule: _Rule | None, longest: int, device: torch.device) -> int:
    """How many slots up to its own a query sees, `longest` where all; 0 where the rule says anything else."""
    if rule is None:
        return 0
    slots, zero = torch.arange(longest, device=device), torch.zeros((), dtype=torch.long, device=device)
    count = int(rule(zero, zero, slots[-1], slots).sum())
    edges = torch.tensor([count - 1, count, count + 1], device=device).clamp(0, longest - 1)
    tried = torch.cat((torch.linspace(0, longest - 1, 20, device=device).long(), edges))[:, None]
    if not torch.equal(rule(zero, zero, tried, slots), (slots <= tried) & (slots > tried - count)):
        return 0
    return count


def _freeze_rope(body: nn.Module) -> None:
    """Up to `max_context` these kinds keep their first frequencies, yet would read back positions to know."""
    for module in body.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            vars(module)["rope_type"] = "default"
            module.register_buffer("inv_freq", module.get_buffer("original_inv_freq"), persistent=False)


class _Scoring(NamedTuple):
    scale: float | None
    softcap: float | None
    sinks: Tensor | None  # scores (H,)


class _Call(Cache):  # type: ignore[misc]
    """What transformers takes for its cache during one call; it answers for masks and attention too."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(layers=[])
        self.positions = positions  # (B, Q)

    def mask(self, slots: int, rule: _Rule) -> Tensor:
        """The model's own rule (causal, sliding, chunked), asked at each row's positions: (B, 1, Q, S) bool."""
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None, None, None]
        every = torch.arange(slots, device=self.positions.device)
        return rule(rows, torch.zeros_like(rows), self.positions[:, None, :, None], every)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: _Scoring) -> Tensor:
        """query (B, H, Q, D); key, value and mask as they were handed out here; gives (B, Q, H, D)."""
        return _attend(query, key, value, mask, scoring)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # the rows have no common length; only the masks ask, and ours go by the positions


class _RowCache(_Call):
    """A KVCache for one call: writes at the call's positions, reads the slots below `bound`."""

    def __init__(self, cache: KVCache, positions: Tensor, bound: int) -> None:
        super().__init__(positions)
        self._cache, self._bound = cache, bound
        self._rows = torch.arange(positions.shape[0], device=positions.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """key_states, value_states: (B, kv_heads, Q, head_dim)."""
        keys, values = self._cache.keys[layer_idx], self._cache.values[layer_idx]
        keys.transpose(1, 2)[self._rows, self.positions] = key_states.transpose(1, 2)
        values.transpose(1, 2)[self._rows, self.positions] = value_states.transpose(1, 2)
        return keys[:, :, : self._bound], values[:, :, : self._bound]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._bound, 0


class _KernelCache(_Call):
    """A KVCache for one call of few tokens, written and read by our kernel, which needs no masks."""

    def __init__(self, cache: KVCache, positions: Tensor, windows: tuple[int | None, ...]) -> None:
        super().__init__(positions.contiguous())
        self._cache, self._windows, self._layer = cache, windows, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self._layer = layer_idx
        return key_states, value_states

    def mask(self, slots: int, rule: _Rule) -> Tensor:
        batch, queries = self.positions.shape
        return torch.empty(batch, 1, queries, 0, dtype=torch.bool, device=self.positions.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: _Scoring) -> Tensor:
        from flashspec.kernels.attention import attend  # needs Triton

        keys, values = self._cache.keys[self._layer], self._cache.values[self._layer]
        qkv = torch.cat([part.transpose(1, 2) for part in (query, key, value)], 2)  # (B, Q, H + 2 kv_heads, D)
        window, rows = self._windows[self._layer], qkv.flatten(2).flatten(0, 1)
        mixed = attend(rows, None, self.positions, keys, values, None, 0.0, window, *scoring)
        return mixed.view(*self.positions.shape, query.shape[1], -1)


class _ProbeCache(_Call):
    """Holds nothing; notes what each layer wants kept, and by which rule it sees that."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(positions)
        self.seen: dict[int, tuple[_Kind, _Kind]] = {}
        self.rules: dict[int, _Rule] = {}  # of the layers that attend with the mask and the keys that they were given
        self._masks: list[tuple[Tensor, _Rule]] = []
        self._kept: tuple[int, Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        key_kind, value_kind = ((tuple(x.shape), x.dtype, x.device) for x in (key_states, value_states))
        self.seen[layer_idx] = key_kind, value_kind
        self._kept = layer_idx, key_states, value_states
        return key_states, value_states

    def mask(self, slots: int, rule: _Rule) -> Tensor:
        mask = super().mask(slots, rule)
        self._masks.append((mask, rule))
        return mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: _Scoring) -> Tensor:
        rule = next((rule for known, rule in self._masks if known is mask), None)
        if rule and self._kept and key is self._kept[1] and value is self._kept[2]:
            self.rules[self._kept[0]] = rule
        return super().attend(query, key, value, mask, scoring)


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


def _position_mask(kv_length: int, mask_function: _Rule, **_: Any) -> Tensor:
    return _CALL.get().mask(kv_length, mask_function)


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
    given = [name for name in _UNSUPPORTED if extra.get(name) is not None]
    if given or attention_mask is None or attention_mask.dtype != torch.bool:
        reason = f"its {', '.join(given)}" if given else "a mask of its own"
        raise FlashSpecError(f"{type(module).__name__} attends by {reason}, which positions cannot express")
    return _CALL.get().attend(query, key, value, attention_mask, _Scoring(scaling, softcap, s_aux)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: _Scoring) -> Tensor:
    """query (B, H, Q, D), key and value (B, kv_heads, S, D), mask (B, 1, Q, S); gives (B, Q, H, D)."""
    scale, softcap, sinks = scoring
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # The query heads of a group share their keys: as extra query rows they need no copy of the cache.
    packed = query.reshape(batch, kv_heads, groups * length, -1)  # (B, kv_heads, G*Q, D)
    mask = mask.repeat(1, 1, groups, 1)  # (B, 1, G*Q, S)
    if softcap is None and sinks is None:
        mixed = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    else:
        scores = packed @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            extra = sinks.to(scores.dtype).view(1, kv_heads, groups, 1).expand(batch, -1, -1, length)
            scores = torch.cat([scores, extra.reshape(batch, kv_heads, -1, 1)], dim=-1)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]]
        mixed = probs.to(value.dtype) @ value
    return mixed.reshape(batch, heads, length, -1).transpose(1, 2).contiguous()


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _position_mask)
