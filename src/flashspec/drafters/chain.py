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
) -> Draft:
    """Draw `length` tokens a row. hidden: (B, hidden) after the committed text, of which score makes logits (B, V);
    read_next(token_ids (B,), offset) gives the next after feeding one more. part: (V',) int64, the tokens that logits
    (B, V') are of, where that is not all. A row's draft ends before its first logits that are not finite."""
    token_ids, sound, weights = [], [], None
    for offset in range(length):
        logits = score(hidden)  # (B, V)
        if weights is None and not context.one_hot_drafts:
            size = context.target.model.vocab_size
            weights = logits.new_empty(len(logits), length, size, dtype=torch.float32)
        chosen, finite = context.draw(logits, offset, None if weights is None else weights[:, offset], part)
        token_ids.append(chosen)
        sound.append(finite)
        if offset + 1 < length:
            hidden = read_next(chosen, offset + 1)
    lengths = torch.stack(sound, 1).long().cumprod(1).sum(1)  # (B,)
    return Draft(torch.stack(token_ids, 1), lengths, weights, lengths < length)


def with_features(draft: Draft, lengths: Tensor) -> Draft:
    """Without the rows whose only token the target has not read."""
    known = lengths > 1
    draft.lengths = draft.lengths * known
    draft.faulty = None if draft.faulty is None else draft.faulty & known
    return draft
