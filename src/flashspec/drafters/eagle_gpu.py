"""An EAGLE-3 head for few tokens on a GPU: ten launches a draft token, all of which a CUDA graph may hold.

Its large weights are read in eight bits, as they are on a CPU: a launch more for each, which rounds its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flashspec.kernels import attention, elementwise, recording
from flashspec.kernels.decoding import MOST_TOKENS, Weight
from flashspec.models.base import KVCache
from flashspec.models.decoder_gpu import FewTokens, Product

if TYPE_CHECKING:
    from flashspec.drafters.eagle import Fusion, Tip
    from flashspec.models.decoder import DecoderConfig, DecoderWeights


def fits(fusion: Fusion) -> bool:
    """Besides what `decoder_gpu.fits` asks: features that 16-byte loads divide."""
    return fusion.fc.shape[1] % 16 == 0


class FewTokensHead(FewTokens):
    """`recall`, `fuse` and `extend` of an EagleHead."""

    recall = staticmethod(recording.recall)

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, frequencies: Tensor, fusion: Fusion) -> None:
        layer, dtype = weights.layers[0], weights.embedding.dtype
        super().__init__(config, weights, frequencies, rounded=True)
        self._hidden_norm = fusion.hidden_norm
        self.fuse = Product(fusion.fc, dtype, rounded=True)
        self._qkv = Product(layer.qkv, dtype, layer.qkv_bias, rounded=True)

    def tune(self) -> None:
        self.fuse.tune()
        super().tune()

    def _qkv_weight(self) -> Weight:
        return self._qkv.few

    def _rehearse(self, tokens: Tensor, cache: KVCache) -> None:
        hidden = self._weights.embedding.new_zeros(*tokens.shape, self._config.hidden_size)
        for _ in range(4):
            self.extend(tokens, hidden, tokens, cache)

    def extend(self, token_ids: Tensor, hidden: Tensor, slots: Tensor, cache: KVCache) -> Tip:
        """Behind the hidden states what `logits` takes."""
        self.tune()
        c, weights, layer = self._config, self._weights, self._weights.layers[0]
        both, waves = elementwise.join(
            token_ids,
            slots,
            weights.embedding,
            layer.attention_norm,
            hidden.flatten(0, 1),
            self._hidden_norm,
            self._frequencies,
            c.rotary_scale,
            c.norm_eps,
        )
        keys, values = cache.keys[0], cache.values[0]
        mixed = attention.attend(self._qkv(both), waves, slots, keys, values, layer.qk_norm, c.norm_eps, None, asked=1)
        add = self._add_narrow if len(mixed) <= MOST_TOKENS else self._add_wide
        return add(0, mixed, hidden[:, -1].contiguous(), weights.final_norm)
