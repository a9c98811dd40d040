"""An EAGLE-3 head (Li et al. 2025): one decoder layer over a token and what the target made of the one before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters import eagle_cpu
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.chain import write_chain
from flashspec.drafters.eagle_cpu import PackedHead
from flashspec.kernels import reference_decoder
from flashspec.models.base import KVCache, LanguageModel
from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights
from flashspec.models.reader import Reader

if TYPE_CHECKING:
    from flashspec.drafters.eagle_gpu import FewTokensHead

# Tokens that every step reads again, beside true features: as many as most steps emit. A GPU reads more at one price,
# up to 64 in all rows together.
WINDOW_ON_CPU, WINDOW_ON_GPU = 4, 8


@dataclass(frozen=True, slots=True)
class Fusion:
    """What comes before the layer. fc: (hidden, n * the target's hidden), over its hidden states of `layers`, low to
    high; hidden_norm: (hidden,). part: (V',) int64, the tokens that the LM head knows; None: all."""

    layers: tuple[int, ...]
    fc: Tensor
    hidden_norm: Tensor
    part: Tensor | None = None


Tip = tuple[Tensor, ...]  # of what was read: hidden states (B, hidden) of the last slots, then what a GPU has prepared


class EagleHead(Decoder):
    """Slot s of its cache stands for token s + 1 beside the target's hidden states at s, and predicts token s + 2.

    Its one layer's qkv weights read (embedding, hidden), each normed: ((H + 2K) D, 2 hidden)."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, fusion: Fusion) -> None:
        super().__init__(config, weights)
        self.fusion = fusion
        self._packed: PackedHead | None = None
        if eagle_cpu.fits(config, self.device, self.dtype):
            self._packed = PackedHead(config, weights, fusion)
        self._fused: FewTokensHead | None = None
        if self._few_tokens is not None:
            from flashspec.drafters import eagle_gpu

            if eagle_gpu.fits(fusion):
                self._few_tokens = self._fused = eagle_gpu.FewTokensHead(config, weights, self._inv_freq, fusion)

    @property
    def recall(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
        """As in `kernels.decoding`."""
        return reference_decoder.recall if self._fused is None else self._fused.recall

    def fuse(self, states: Tensor) -> Tensor:
        """The target's hidden states (B, Q, n * the target's hidden) as the layer takes them, (B, Q, hidden)."""
        fast = self._fused or self._packed
        return self._linear(states, self.fusion.fc) if fast is None else fast.fuse(states)

    def extend(self, token_ids: Tensor, hidden: Tensor, slots: Tensor, cache: KVCache, bound: int) -> Tip:
        """token_ids, slots: (B, Q) int64; hidden: (B, Q, hidden), fused or, while drafting, the tip's of the slot
        before."""
        if self._fused is not None and self._fused.takes(token_ids):
            return self._fused.extend(token_ids, hidden, slots, cache)
        if self._packed is not None:
            return (self._packed.extend(token_ids, hidden, slots, cache, bound),)
        layer, (keys, values) = self.weights.layers[0], (cache.keys[0], cache.values[0])
        embedded = self._norm(F.embedding(token_ids, self.weights.embedding), layer.attention_norm)
        both = torch.cat([embedded, self._norm(hidden, self.fusion.hidden_norm)], -1)  # (B, Q, 2 hidden)
        queries = self._write(layer, both, self._places(slots), keys, values)
        last, keys, values = slots[:, -1:], keys[:, :, :bound], values[:, :, :bound]
        attended = self._attend(queries[:, -1:], keys, values, self._mask(last, bound, None))[:, 0]  # (B, H D)
        hidden = hidden[:, -1] + self._linear(attended, layer.output, layer.output_bias)
        return (hidden + self._mlp(layer, self._norm(hidden, layer.mlp_norm)),)

    def predict(self, tip: Tip) -> Tensor:
        """Logits (B, V') float32 of the token after next."""
        hidden, *prepared = tip
        if self._fused is not None and prepared:
            return self._fused.logits(*prepared)
        if self._packed is not None and self._packed.logits is not None:
            return self._packed.logits(hidden)
        return self.logits(self._norm(hidden, self.weights.final_norm))


class HeadReader(Reader):
    """A head's cache. Slots written while drafting never count: they rest on the head's own states, not the target's.

    target: whose features it reads; set when a batch begins."""

    target: Reader

    @property
    def head(self) -> EagleHead:
        assert isinstance(self.model, EagleHead)
        return self.model

    def read_text(
        self, tokens: Tensor, lengths: Tensor, bound: int, size: int, start: Tensor | None = None, ahead: int = 0
    ) -> tuple[Tip, Tensor]:
        """Read slots of tokens (B, T), the last `size` whose token is known or as many from start (B,) on; the tip, and
        the next slots (B, ahead)."""
        features, layers, room = self.target.features, self.head.fusion.layers, self.cache.capacity
        assert features is not None
        token_ids, slots, states, following = self.head.recall(
            tokens, lengths, self.cached, features.by_layer[:, :room], features.places(layers), start, size, ahead
        )
        return self.extend(token_ids, self.head.fuse(states), slots, bound), following

    def extend(self, token_ids: Tensor, hidden: Tensor, slots: Tensor, bound: int) -> Tip:
        return self.head.extend(token_ids, hidden, slots, self.cache, min(bound, self.cache.capacity))

    def read_on(self, tokens: Tensor, lengths: Tensor, bound: int, size: int) -> None:
        self.read_text(tokens, lengths, bound, size, start=self.cached.clone())

    def restart(self, bound: int, kept: int = 0) -> None:
        super().restart(bound, max(kept - 1, 0))  # the last slot kept knows the token after it

    def advance(self, emitted: int) -> bool:
        self.stale = emitted if self._takes_part else self.stale + emitted
        self._takes_part = False
        return True


class EagleDrafter(Drafter):
    lengths = (2, 4, 6)

    def __init__(self, head: EagleHead, name: str = "eagle3") -> None:
        self.head = head
        self.name = name
        self.feature_layers = tuple(sorted(set(head.fusion.layers)))

    @classmethod
    def create(cls, target: LanguageModel) -> Drafter:
        """The head that comes with the package for this target; FlashSpecError where there is none."""
        from flashspec.drafters.shipped import load_shipped

        return load_shipped("eagle3", target)

    def start(self, context: DraftContext) -> Proposer:
        context.record_features(self.feature_layers)
        window = WINDOW_ON_CPU if self.head.device.type == "cpu" else WINDOW_ON_GPU
        reader = context.add_reader(self.head, window, HeadReader)
        assert isinstance(reader, HeadReader)
        reader.target = context.target
        return EagleProposer(reader)


class EagleProposer(Proposer):
    def __init__(self, reader: HeadReader) -> None:
        self.reader = reader

    def prepare(self, context: DraftContext) -> None:
        context.catch_up(context.target)  # a batch that began without features lacks them
        context.catch_up(self.reader)

    def propose(self, context: DraftContext, length: int) -> Draft:
        reader, head = self.reader, self.reader.head
        tip, ahead = reader.read_text(context.tokens, context.lengths, context.bound, reader.lag, ahead=length - 1)

        def read_next(token_ids: Tensor, offset: int) -> Tip:
            nonlocal tip
            tip = reader.extend(token_ids, tip[0][:, None], ahead[:, offset - 1, None], context.bound + offset)
            return tip

        # A text of one token has no features yet.
        return write_chain(context, length, head.predict, tip, read_next, head.fusion.part, least=2)
