"""Medusa heads (Cai et al. 2024): each guesses a token further ahead, all from what the target made of one position.

Published heads read the final-normed one alone. Ours also read what EAGLE-3 heads do: earlier layers' states, and the
token behind them, which is committed before the target has read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.chain import write_chain
from flashspec.kernels import decoding
from flashspec.models.base import LanguageModel


class Beside:
    """What the heads add to the final hidden state: fc (hidden, (n + 2) hidden) over the target's hidden states of
    `layers`, low to high, over the final one and the embedding (V, hidden) of the token behind them."""

    def __init__(self, layers: tuple[int, ...], fc: Tensor, embedding: Tensor) -> None:
        self.layers, self.fc, self.embedding = layers, fc, embedding
        self._fuse = product_by(fc, fc.dtype)

    def __call__(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """states (B, (n + 1) hidden), token_ids (B,) -> (B, hidden)."""
        return self._fuse(torch.cat([states, F.embedding(token_ids, self.embedding)], -1))


@dataclass(frozen=True, slots=True)
class MedusaHeads:
    """N heads of residual blocks, each block x + silu(weight x + bias).

    blocks: weight (N, hidden, hidden) and bias (N, hidden) of the first, second ... block of all heads. lm_heads:
    (N, V', hidden) of their own, or score: (..., hidden) -> (..., V') float32, which they share. layer: the target's
    final-normed hidden state, as Features has it. part: (V',) int64, the tokens that they know; None: all. beside: what
    is added to that state ahead of the blocks; None: nothing.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    layer: int
    lm_heads: Tensor | None = None
    score: Callable[[Tensor], Tensor] | None = None
    part: Tensor | None = None
    beside: Beside | None = None

    @property
    def count(self) -> int:
        return len(self.blocks[0][0])

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states that they read."""
        return (self.layer,) if self.beside is None else (*self.beside.layers, self.layer)

    def read(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """states (B, len(layers) * hidden), token_ids (B,) behind them -> (B, hidden), what the blocks take."""
        if self.beside is None:
            return states
        return states[:, -len(self.beside.fc) :] + self.beside(states, token_ids)

    def logits(self, hidden: Tensor, count: int) -> Tensor:
        """hidden (B, hidden) -> (count, B, V') float32 of the first heads."""
        ahead = hidden.expand(count, -1, -1)  # (count, B, hidden)
        for weight, bias in self.blocks:
            ahead = ahead + F.silu(torch.baddbmm(bias[:count, None], ahead, weight[:count].mT))
        if self.lm_heads is not None:
            return torch.bmm(ahead, self.lm_heads[:count].mT).float()
        assert self.score is not None
        return self.score(ahead)


def product_by(weight: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """(..., in) -> (..., out) in a dtype by a weight (out, in): float32 for the rows of an LM head."""
    if decoding.available(weight.device) and weight.shape[1] % 16 == 0:
        from flashspec.models.decoder_gpu import Product

        return Product(weight, dtype, rounded=True)
    return lambda hidden: F.linear(hidden, weight).to(dtype)


class MedusaDrafter(Drafter):
    """Drafts at most as many tokens as there are heads."""

    def __init__(self, heads: MedusaHeads, name: str = "medusa") -> None:
        self.heads = heads
        self.name = name
        self.longest = heads.count
        self.lengths = tuple(sorted({min(length, heads.count) for length in (2, 4)}))
        self.feature_layers = tuple(sorted(set(heads.layers)))

    @classmethod
    def create(cls, target: LanguageModel) -> Drafter:
        """The heads that come with the package for this target; FlashSpecError where there are none."""
        from flashspec.drafters.shipped import load_shipped

        return load_shipped("medusa", target)

    def start(self, context: DraftContext) -> Proposer:
        context.record_features(self.feature_layers)
        return MedusaProposer(self.heads)


class MedusaProposer(Proposer):
    def __init__(self, heads: MedusaHeads) -> None:
        self.heads = heads

    def prepare(self, context: DraftContext) -> None:
        context.catch_up(context.target)  # a batch that began without features lacks them

    def propose(self, context: DraftContext, length: int) -> Draft:
        heads, features = self.heads, context.target.features
        assert features is not None
        length = min(length, heads.count)
        last = (context.lengths[:, None] - 2).clamp(min=0)  # (B, 1), whose features are known
        token_ids = context.tokens.gather(1, context.lengths[:, None] - 1)[:, 0]  # (B,), behind them
        hidden = heads.read(features.at(heads.layers, last)[:, 0], token_ids)
        logits = heads.logits(hidden, length)  # (length, B, V')
        # A text of one token has no features yet.
        return write_chain(context, length, lambda x: x, logits[0], lambda _, i: logits[i], heads.part, least=2)
