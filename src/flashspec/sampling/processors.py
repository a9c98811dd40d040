"""Logits to log-weights: every transform of the target's distribution, at every draft position.

A row of log-weights is an unnormalised log-distribution; -inf is a token that cannot be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flashspec.kernels import cut_floors

NEVER = float("-inf")


@dataclass(slots=True)
class Transforms:
    """Sampling parameters a row. Tensors of shape (B,) unless said; None where no row uses the transform.

    temperature: float32, 0 is greedy. top_k: int64, at most `max_top_k`. bias: (B, V) float32,
    added to the logits. prompt_seen: (B, V) bool and output_counts: (B, V) float32 feed repetition, presence and
    frequency. stop_ids: (B, K) int64, masked before text position min_lengths.
    """

    temperature: Tensor
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
    def shifts(self) -> bool:
        """Whether a row's logits are biased, penalised or barred from stopping."""
        return self.bias is not None or self.output_counts is not None or self.min_lengths is not None

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

    def floors(self, logits: Tensor) -> Tensor | None:
        """Top-k, top-p and min-p: (B, Q) shifted logits under which a token is out, from all of them (B, Q, V)."""
        if not self.cuts:
            return None
        return cut_floors(logits, self.temperature, self.top_k, self.top_p, self.min_p, self.max_top_k or None)

    def count(self, token_ids: Tensor, num_emitted: Tensor) -> None:
        """Add the first num_emitted (B,) of token_ids (B, n) to the output counts."""
        if self.output_counts is not None:
            kept = torch.arange(token_ids.shape[1], device=token_ids.device) < num_emitted[:, None]
            self.output_counts.scatter_add_(1, token_ids, kept.to(self.output_counts.dtype))
