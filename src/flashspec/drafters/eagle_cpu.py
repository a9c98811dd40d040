"""An EAGLE-3 head on a CPU: its layer as one native call, its matrices in q8_0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels import native_build
from flashspec.kernels.native import BLOCK, GROUP, NativeLayer, NativeShape, PackedLinear, PackedMatrix
from flashspec.kernels.native_head import NativeHead
from flashspec.models.base import KVCache

if TYPE_CHECKING:
    from flashspec.drafters.eagle import Fusion
    from flashspec.models.decoder import DecoderConfig, DecoderWeights, LayerWeights

MATRICES, BIASES = ("q", "k", "v", "o", "gate", "up", "down"), ("q_bias", "k_bias", "v_bias")


def fits(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    even = config.hidden_size % BLOCK == 0 and config.head_dim % GROUP == 0 and not config.qk_norm
    return even and device.type == "cpu" and dtype == torch.float32 and native_build.available()


class PackedHead:
    """`fuse`, `extend` and `logits` of an EagleHead, near enough: rounding its weights to q8_0, 0.53 of bfloat16's
    bytes, moves what it drafts by a hair and never the text. An LM head of the whole vocabulary is most often the
    target's own tensor and stays as it is: logits is None."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, fusion: Fusion) -> None:
        self._embedding = weights.embedding
        self._layer = _native(config, weights.layers[0], fusion.hidden_norm)
        self.fuse = PackedLinear(PackedMatrix.quantised(fusion.fc))
        self.logits: PackedLinear | None = None
        if len(weights.lm_head) < config.vocab_size:
            self.logits = PackedLinear(PackedMatrix.quantised(weights.lm_head), weights.final_norm, config.norm_eps)

    def extend(self, token_ids: Tensor, hidden: Tensor, slots: Tensor, cache: KVCache, bound: int) -> Tensor:
        embedded = F.embedding(token_ids, self._embedding)
        return self._layer.extend(embedded, hidden, slots, cache.keys, cache.values, bound)


def _native(config: DecoderConfig, layer: LayerWeights, hidden_norm: Tensor) -> NativeHead:
    ends = (config.num_heads * config.head_dim, (config.num_heads + config.num_kv_heads) * config.head_dim)
    matrices = [*layer.qkv.tensor_split(ends), layer.output, *layer.gate_up.chunk(2), layer.down]
    parts: dict[str, Any] = dict(zip(MATRICES, map(PackedMatrix.quantised, matrices), strict=True))
    if layer.qkv_bias is not None:
        parts |= dict(zip(BIASES, layer.qkv_bias.tensor_split(ends), strict=True))
    native = NativeLayer(layer.attention_norm, layer.mlp_norm, o_bias=layer.output_bias, **parts)
    shape = NativeShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=1,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
    )
    angles = torch.arange(config.max_context)[:, None] * torch.tensor(config.inv_freq)  # (max_context, D / 2)
    cos, sin = (wave * config.rotary_scale for wave in (angles.cos(), angles.sin()))
    return NativeHead(shape, native, hidden_norm, cos, sin)
