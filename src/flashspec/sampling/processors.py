"""Logits to log-weights: every transform of the target's distribution, at every draft position.

A row of log-weights is an unnormalised log-distribution; -inf is a token that cannot be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = float("-inf")


@dataclass(slots=True)
class Transforms:
    """Sampling parameters a row. Tensors of shape (B,) unless said; None where no row uses the transform.

    temperature: float32. greedy: bool, rows at temperature 0. top_k: int64, at most `max_top_k`. bias: (B, V) float32,
    added to the logits. prompt_seen: (B, V) bool and output_counts: (B, V) float32 feed repetition, presence and
    frequency. stop_ids: (B, K) int64, masked before text position min_lengths.
    """

    temperature: Tensor
    greedy: Tensor | None = None
    all_greedy: bool = False
    top_k: Tensor | None = None
    max_top_k: int = 0
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    bias: Tensor | None = None
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None
    prompt_seen: Tensor | None = None
    output_counts: Tensor | None = None
    stop_ids: Tensor | None = None
    min_lengths: Tensor | None = None

    @property
    def cuts(self) -> bool:
        """Whether a row rules out tokens by top-k, top-p or min-p."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    def shift(self, logits: Tensor, positions: Tensor, draft_ids: Tensor) -> Tensor:
        """Bias, minimum length and penalties: (B, Q, V) logits that decide text positions (B, Q), where row i follows
        the first i of draft_ids (B, Q - 1)."""
        logits = logits.float()
        if self.bias is not None:
            logits = logits + self.bias[:, None]
        if self.min_lengths is not None and self.stop_ids is not None:
            early = positions < self.min_lengths[:, None]  # (B, Q)
            stops = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter_(1, self.stop_ids, True)
            logits = logits.masked_fill(early[..., None] & stops[:, None], NEVER)
        if self.output_counts is not None:
            logits = self._penalise(logits, draft_ids)
        return logits

    def _penalise(self, logits: Tensor, draft_ids: Tensor) -> Tensor:
        assert self.output_counts is not None and self.prompt_seen is not None
        assert self.repetition is not None and self.presence is not None and self.frequency is not None
        drafted = F.one_hot(draft_ids, logits.shape[-1]).to(logits.dtype).cumsum(1)  # (B, Q - 1, V)
        counts = self.output_counts[:, None] + F.pad(drafted, (0, 0, 1, 0))  # (B, Q, V)
        seen = self.prompt_seen[:, None] | (counts > 0)
        repetition = self.repetition[:, None, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        return logits - self.frequency[:, None, None] * counts - self.presence[:, None, None] * (counts > 0)

    def weigh(self, logits: Tensor) -> Tensor:
        """Temperature, top-k, top-p and min-p: (B, Q, V) shifted logits to log-weights. Greedy rows are one-hot."""
        weights = logits / self.temperature[:, None, None].clamp(min=1e-6)
        if self.top_k is not None:
            ranked = weights.topk(self.max_top_k, dim=-1).values  # (B, Q, max_top_k)
            index = (self.top_k - 1)[:, None, None].expand(*ranked.shape[:2], 1).clamp(min=0)
            kth = torch.where((self.top_k > 0)[:, None, None], ranked.gather(-1, index), NEVER)
            weights = weights.masked_fill(weights < kth, NEVER)
        if self.top_p is not None:
            weights = keep_nucleus(weights, self.top_p[:, None, None])
        if self.min_p is not None:
            floor = weights.amax(-1, keepdim=True) + self.min_p.log()[:, None, None]
            weights = weights.masked_fill(weights < floor, NEVER)
        if self.greedy is not None:
            one_hot = torch.full_like(logits, NEVER).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
            weights = torch.where(self.greedy[:, None, None], one_hot, weights)
        return weights

    def count(self, token_ids: Tensor, kept: Tensor) -> None:
        """Add emitted tokens (B, n) where kept (B, n) is true to the output counts."""
        if self.output_counts is not None:
            self.output_counts.scatter_add_(1, token_ids, kept.to(self.output_counts.dtype))


def keep_nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Mask all but the smallest set of most likely tokens that holds at least top_p (broadcastable) of the mass.

    Ties at its edge are kept. The edge is found by halving the interval of probabilities, so nothing is sorted: a sort
    of 49,152 floats costs 3 ms on a CPU core, 24 halvings 0.4 ms.
    """
    probs = weights.softmax(-1)
    high = probs.amax(-1, keepdim=True)
    low = torch.zeros_like(high)
    enough = torch.minimum(top_p, probs.sum(-1, keepdim=True))
    for _ in range(24):
        middle = (low + high) / 2
        holds = torch.where(probs >= middle, probs, 0.0).sum(-1, keepdim=True) >= enough
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where((probs >= low) | (top_p >= 1), weights, NEVER)
