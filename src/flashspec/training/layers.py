"""Decoder layers over whole sequences: no cache, and gradients where their weights ask for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels import decoding
from flashspec.models.decoder import DecoderConfig, LayerWeights, rotate

Waves = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D / 2) float32
P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """On a GPU as torch.compile makes it; its first argument that is a tensor says where."""

    @functools.cache
    def fast() -> Callable[P, R]:
        return torch.compile(function)  # loads the compiler, which takes a second

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        return (fast() if decoding.available(device) else function)(*args, **kwargs)

    return run


def rotary_waves(inv_freq: Sequence[float], scale: float, positions: Tensor) -> Waves:
    """positions: (T,)."""
    angles = positions[:, None, None].float() * torch.tensor(inv_freq, device=positions.device)
    return angles.cos() * scale, angles.sin() * scale


def rotated(heads: Tensor, waves: Waves) -> Tensor:
    """heads (B, T, heads, D), in their own dtype."""
    cos, sin = (wave.to(heads.dtype) for wave in waves)
    return rotate(heads, cos, sin)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """queries (B, T, H, D) over keys, values (B, S, K, D); mask (T, S) bool, None: causal. Returns (B, T, H D).

    The kv heads are repeated: with a mask, no fused attention of PyTorch takes fewer kv heads than query heads."""
    groups = queries.shape[2] // keys.shape[2]
    keys, values = (heads.repeat_interleave(groups, 2).transpose(1, 2) for heads in (keys, values))
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None
    )
    return mixed.transpose(1, 2).flatten(2)


@compiled
def decoder_layer(
    config: DecoderConfig, layer: LayerWeights, hidden: Tensor, waves: Waves, mask: Tensor | None
) -> Tensor:
    """The residual stream (B, T, hidden) after one layer of the Llama family."""
    c = config
    normed = F.rms_norm(hidden, layer.attention_norm.shape, layer.attention_norm, c.norm_eps)
    heads = F.linear(normed, layer.qkv, layer.qkv_bias).view(*hidden.shape[:2], -1, c.head_dim)  # (B, T, H + 2K, D)
    pairs, values = heads.tensor_split((c.num_heads + c.num_kv_heads,), dim=2)
    if layer.qk_norm is not None:
        pairs = F.rms_norm(pairs, (c.head_dim,), eps=c.norm_eps) * layer.qk_norm
    queries, keys = rotated(pairs, waves).tensor_split((c.num_heads,), dim=2)
    hidden = hidden + F.linear(attend(queries, keys, values, mask), layer.output, layer.output_bias)
    normed = F.rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, c.norm_eps)
    gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
    return hidden + F.linear(F.silu(gate) * up, layer.down)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(T, T) bool for a sliding window; None where it covers the whole text."""
    if window is None or window >= length:
        return None
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril() & everything.triu(1 - window)
