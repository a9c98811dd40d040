"""Prompt lookup (Saxena 2023): what followed the last occurrence of the text's last few tokens is proposed again.
Entirely on the device: the number of operations depends on neither the text nor a match."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer


class NgramDrafter(Drafter):
    """Matches of the last min_ngram..max_ngram tokens; the longest wins, then the latest."""

    name = "ngram"

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram is {min_ngram}; it should be from 1 to max_ngram = {max_ngram}")
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def start(self, context: DraftContext) -> Proposer:
        return NgramProposer(self.max_ngram, self.min_ngram)


class NgramProposer(Proposer):
    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def propose(self, context: DraftContext, length: int) -> Draft:
        token_ids, found = look_up(
            context.tokens, context.lengths, context.bound, length, self.max_ngram, self.min_ngram
        )
        return Draft(token_ids, found * length)


def look_up(
    tokens: Tensor, lengths: Tensor, bound: int, length: int, max_ngram: int, min_ngram: int
) -> tuple[Tensor, Tensor]:
    """tokens: (B, T), lengths: (B,), bound >= every length. Returns ids (B, length) and found (B,) bool. A match so
    near the end that its continuation runs out of text repeats the stretch between match and end."""
    text = tokens[:, :bound]  # (B, S)
    ends = torch.arange(bound, device=tokens.device)  # where a match may end
    matched = ends < lengths[:, None] - 1  # (B, S)
    matched_length = torch.zeros_like(text)
    for back in range(max_ngram):
        last = tokens.gather(1, (lengths[:, None] - 1 - back).clamp(min=0))  # (B, 1)
        matched = matched & (text.roll(back, 1) == last) & (ends >= back)
        matched_length += matched
    best_length, best_end = (matched_length * bound + ends).max(1)
    start = best_end[:, None] + 1  # (B, 1), the continuation's first token
    period = (lengths[:, None] - start).clamp(min=1)
    offsets = torch.arange(length, device=tokens.device) % period  # (B, length)
    return tokens.gather(1, start + offsets), best_length >= min_ngram * bound
