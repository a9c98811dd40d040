"""The loop that writes a draft token by token, for drafters that are networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext

T = TypeVar("T")


def write_chain(
    context: DraftContext,
    length: int,
    score: Callable[[T], Tensor],
    read: T,
    read_next: Callable[[Tensor, int], T],
    part: Tensor | None = None,
    least: int = 1,
) -> Draft:
    """Draw `length` tokens a row. read: what was made of the committed text, of which score makes logits (B, V);
    read_next(token_ids (B, 1), offset) gives the next after feeding one more. part: (V',) int64, the tokens that logits
    (B, V') are of, where that is not all. A row's draft ends before its first logits that are not finite; one whose
    text is shorter than `least` has none."""
    size, like = (len(context.lengths), length), context.lengths
    weights = None
    if not context.one_hot_drafts:
        weights = like.new_empty(*size, context.target.model.vocab_size, dtype=torch.float32)
    token_ids, lengths = like.new_empty(size), torch.empty_like(like)
    draft = Draft(token_ids, lengths, weights, torch.empty_like(lengths, dtype=torch.bool))
    for offset in range(length):
        context.draw(score(read), draft, offset, part, least)
        if offset + 1 < length:
            read = read_next(token_ids[:, offset, None], offset + 1)
    return draft


def slots_from(lengths: Tensor, first: int, count: int, capacity: int) -> Tensor:
    """(B, count) int64: lengths + first, lengths + first + 1 ... of lengths (B,), within a cache. Made once for a whole
    draft, as every operation on a few numbers takes a GPU 2 us, and column by column, as columns are what is read."""
    ahead = torch.arange(first, first + count, device=lengths.device)[:, None]
    return (lengths + ahead).clamp(0, capacity - 1).T
