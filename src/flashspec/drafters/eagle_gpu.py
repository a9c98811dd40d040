"""An EAGLE-3 head for few tokens on a GPU: nine launches a draft token, all of which a CUDA graph may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flashspec.kernels import elementwise
from flashspec.kernels.decoding import MOST_TOKENS
from flashspec.models.base import KVCache
from flashspec.models.decoder_gpu import FewTokens, Product

if TYPE_CHECKING:
    from flashspec.drafters.eagle import Fusion
    from flashspec.models.decoder import DecoderConfig, DecoderWeights


def fits(fusion: Fusion) -> bool:
    """Besides what `decoder_gpu.fits` asks: features that 16-byte loads divide."""
    return fusion.fc.shape[1] % 16 == 0


class FewTokensHead(FewTokens):
    """`fuse`, `extend` and `logits` of an EagleHead."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, frequencies: Tensor, fusion: Fusion) -> None:
        super().__init__(config, weights, frequencies)
        layer, dtype = weights.layers[0], weights.embedding.dtype
        self._hidden_norm = fusion.hidden_norm
        self.fuse = Product(fusion.fc, dtype)
        self._qkv = Product(layer.qkv, dtype, layer.qkv_bias)

    def tune(self) -> None:
        super().tune()
        self.fuse.tune()

    def extend(self, token_ids: Tensor, hidden: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
        self.tune()
        c, weights, layer = self._config, self._weights, self._weights.layers[0]
        slots = slots.contiguous()
        both, waves = elementwise.join(
            token_ids.contiguous(),
            slots,
            weights.embedding,
            layer.attention_norm,
            hidden.flatten(0, 1).contiguous(),
            self._hidden_norm,
            self._frequencies,
            c.rotary_scale,
            c.norm_eps,
        )
        mixed = self._attend(0, self._qkv(both), waves, slots, cache)
        mixed, hidden = mixed.view(*slots.shape, -1)[:, -1].contiguous(), hidden[:, -1].contiguous()
        add = self._add_narrow if len(hidden) <= MOST_TOKENS else self._add_wide
        return add(layer, mixed, hidden, weights.final_norm)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        normed = elementwise.normalise(hidden.contiguous(), self._weights.final_norm, self._config.norm_eps)
        return super().logits(normed)
