"""The loop that writes a draft token by token, for drafters that are networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext
from flashspec.models.base import LanguageModel


def write_chain(
    context: DraftContext,
    length: int,
    model: LanguageModel,
    hidden: Tensor,
    read_next: Callable[[Tensor, int], Tensor],
) -> Draft:
    """Draw `length` tokens a row. hidden: (B, hidden) after the committed text; read_next(token_ids (B,), offset)
    gives the next after feeding one more. A row's draft ends before its first logits that are not finite."""
    token_ids, weights, sound = [], [], []
    for offset in range(length):
        logits = model.logits(hidden)  # (B, V)
        sound.append(logits.amax(-1).isfinite())
        chosen, drawn_from = context.choose(logits, offset)
        token_ids.append(chosen)
        if drawn_from is not None:
            weights.append(drawn_from)
        if offset + 1 < length:
            hidden = read_next(chosen, offset + 1)
    lengths = torch.stack(sound, 1).long().cumprod(1).sum(1)  # (B,)
    return Draft(torch.stack(token_ids, 1), lengths, torch.stack(weights, 1) if weights else None, lengths < length)
