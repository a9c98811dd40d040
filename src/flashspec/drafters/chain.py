"""The loop that writes a draft token by token, for drafters that are networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext


def write_chain(
    context: DraftContext,
    length: int,
    score: Callable[[Tensor], Tensor],
    hidden: Tensor,
    read_next: Callable[[Tensor, int], Tensor],
    part: Tensor | None = None,
    least: int = 1,
) -> Draft:
    """Draw `length` tokens a row. hidden: (B, hidden) after the committed text, of which score makes logits (B, V);
    read_next(token_ids (B, 1), offset) gives the next after feeding one more. part: (V',) int64, the tokens that logits
    (B, V') are of, where that is not all. A row's draft ends before its first logits that are not finite; one whose
    text is shorter than `least` has none."""
    size = len(hidden), length
    weights = None
    if not context.one_hot_drafts:
        weights = hidden.new_empty(*size, context.target.model.vocab_size, dtype=torch.float32)
    token_ids, lengths = hidden.new_empty(size, dtype=torch.int64), hidden.new_empty(len(hidden), dtype=torch.int64)
    draft = Draft(token_ids, lengths, weights, torch.empty_like(lengths, dtype=torch.bool))
    for offset in range(length):
        context.draw(score(hidden), draft, offset, part, least)
        if offset + 1 < length:
            hidden = read_next(token_ids[:, offset, None], offset + 1)
    return draft


def slots_from(lengths: Tensor, first: int, count: int, capacity: int) -> Tensor:
    """(B, count) int64: lengths + first, lengths + first + 1 ... of lengths (B,), within a cache. Made once for a whole
    draft, as every operation on a few numbers takes a GPU 2 us, and column by column, as columns are what is read."""
    ahead = torch.arange(first, first + count, device=lengths.device)[:, None]
    return (lengths + ahead).clamp(0, capacity - 1).T
