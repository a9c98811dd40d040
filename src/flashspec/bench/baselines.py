"""transformers' own model over our weights: what a step costs there, eager, captured and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.models.base import LanguageModel
from flashspec.models.decoder import Decoder, DecoderConfig, LayerWeights


def llama_twin(model: LanguageModel, dtype: torch.dtype | None = None) -> Any:
    """A `LlamaForCausalLM` whose parameters are views of the model's weights, so that it costs no memory of its own;
    copies where another dtype is asked for.

    FlashSpecError for a model that is not a fast decoder, and for what a Llama has not: q and k norms, windows, a bias
    on qkv alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not isinstance(model, Decoder):
        raise FlashSpecError(f"a {type(model).__name__} has no twin in transformers: only the fast decoder does")
    c, weights = model.config, model.weights
    if c.qk_norm or c.qkv_bias != c.output_bias or any(c.windows):
        raise FlashSpecError("transformers' Llama has no q and k norms, no sliding windows, and all biases or none")
    settings = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_context,
        rms_norm_eps=c.norm_eps,
        attention_bias=c.qkv_bias,
        tie_word_embeddings=False,
        dtype=dtype or weights.embedding.dtype,
    )
    with torch.device("meta"):
        twin = LlamaForCausalLM(settings)
    twin.requires_grad_(False)
    tensors = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
        "lm_head.weight": weights.lm_head,
    }
    for index, layer in enumerate(weights.layers):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in _layer_views(c, layer).items()}
    twin.load_state_dict({name: tensor.to(settings.dtype) for name, tensor in tensors.items()}, assign=True)
    rotary = twin.model.rotary_emb  # its frequencies stay float32
    rotary.inv_freq = torch.tensor(c.inv_freq, dtype=torch.float32, device=weights.embedding.device)
    rotary.original_inv_freq = rotary.inv_freq
    rotary.attention_scaling = c.rotary_scale
    return twin.eval()


def _layer_views(config: DecoderConfig, layer: LayerWeights) -> dict[str, Tensor]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gate, up = layer.gate_up.chunk(2)
    views = {
        "input_layernorm.weight": layer.attention_norm,
        "post_attention_layernorm.weight": layer.mlp_norm,
        "self_attn.o_proj.weight": layer.output,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": layer.down,
    }
    for fused, kind in ((layer.qkv, "weight"), (layer.qkv_bias, "bias")):
        if fused is not None:
            parts = zip("qkv", fused.tensor_split((heads, heads + kv_heads)), strict=True)
            views |= {f"self_attn.{name}_proj.{kind}": part for name, part in parts}
    if layer.output_bias is not None:
        views["self_attn.o_proj.bias"] = layer.output_bias
    return views


@dataclass(slots=True)
class StaticForward:
    """A forward of `width` tokens a row over a static cache that holds `context` of them when it is done.

    Calling it advances the cache; `rewind` goes back to where `calls` of them fit."""

    model: Any
    forward: Callable[..., Any]
    cache: Any
    token_ids: Tensor  # (B, width)
    start: int

    @classmethod
    def make(cls, model: Any, batch_size: int, width: int, context: int, calls: int, compiled: bool) -> StaticForward:
        from transformers import StaticCache

        forward = torch.compile(model, dynamic=False) if compiled else model
        start = context - calls * width
        if start < 1:
            raise FlashSpecError(f"context is {context}; {calls} calls of {width} tokens do not fit")
        cache = StaticCache(config=model.config, max_cache_len=context)
        token_ids = torch.zeros(batch_size, width, dtype=torch.int64, device=model.device)
        made = cls(model, forward, cache, token_ids, start)
        made(0)  # the first forward allocates the cache
        made.rewind()
        return made

    @torch.no_grad()
    def __call__(self, index: int) -> Tensor:
        logits: Tensor = self.forward(self.token_ids, past_key_values=self.cache, use_cache=True).logits
        return logits

    @torch.no_grad()
    def rewind(self) -> None:
        lengths = [layer.cumulative_length for layer in self.cache.layers]
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, self.start)
