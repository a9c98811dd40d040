"""Medusa heads (Cai et al. 2024): each guesses a token further ahead, all from the target's last hidden state."""

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


@dataclass(frozen=True, slots=True)
class MedusaHeads:
    """N heads of residual blocks, each block x + silu(weight x + bias).

    blocks: weight (N, hidden, hidden) and bias (N, hidden) of the first, second ... block of all heads. lm_heads:
    (N, V', hidden) of their own, or score: (..., hidden) -> (..., V') float32, which they share. layer: the target's
    final-normed hidden state, as Features has it. part: (V',) int64, the tokens that they know; None: all.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    layer: int
    lm_heads: Tensor | None = None
    score: Callable[[Tensor], Tensor] | None = None
    part: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.blocks[0][0])

    def logits(self, hidden: Tensor, count: int) -> Tensor:
        """hidden (B, hidden) -> (count, B, V') float32 of the first heads."""
        ahead = hidden.expand(count, -1, -1)  # (count, B, hidden)
        for weight, bias in self.blocks:
            ahead = ahead + F.silu(torch.baddbmm(bias[:count, None], ahead, weight[:count].mT))
        if self.lm_heads is not None:
            return torch.bmm(ahead, self.lm_heads[:count].mT).float()
        assert self.score is not None
        return self.score(ahead)


def score_by(lm_head: Tensor) -> Callable[[Tensor], Tensor]:
    """(..., hidden) -> (..., V') float32 by rows (V', hidden) of an LM head."""
    if decoding.available(lm_head.device) and lm_head.shape[1] % 16 == 0:
        from flashspec.models.decoder_gpu import Product

        return Product(lm_head, torch.float32)
    return lambda hidden: F.linear(hidden, lm_head).float()


class MedusaDrafter(Drafter):
    """Drafts at most as many tokens as there are heads."""

    def __init__(self, heads: MedusaHeads, name: str = "medusa") -> None:
        self.heads = heads
        self.name = name
        self.lengths = tuple(sorted({min(length, heads.count) for length in (2, 4)}))
        self.feature_layers = (heads.layer,)

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
        logits = heads.logits(features.at((heads.layer,), last)[:, 0], length)  # (length, B, V')
        # A text of one token has no features yet.
        return write_chain(context, length, lambda x: x, logits[0], lambda _, i: logits[i], heads.part, least=2)
