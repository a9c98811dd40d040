"""The draft vocabulary: the target's most frequent tokens, so that the LM head does not eat the gain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDED = 64  # to a multiple of so many entries, which products like


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """ids: (V',) int64, the target's ids in ascending order. vocab_size: the target's."""

    ids: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def d2t(self) -> Tensor:
        """(V',) int64: what is added to a draft id to get the target's."""
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        """(V,) bool: which of the target's ids can be drafted."""
        known = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.ids.device)
        known[self.ids] = True
        return known

    def to(self, device: torch.device) -> DraftVocabulary:
        return DraftVocabulary(self.ids.to(device), self.vocab_size)


def choose_vocabulary(counts: Tensor, coverage: float, most: int, always: Iterable[int] = ()) -> DraftVocabulary:
    """The fewest ids that make up `coverage` of counts (V,), at most `most`, the ids of `always` among them."""
    size = len(counts)
    weights = counts.double()
    weights[list(always)] += counts.sum() + 1  # ahead of all others
    order = torch.argsort(weights, descending=True, stable=True)
    covered = counts[order].double().cumsum(0) / counts.sum().clamp(min=1)
    needed = int((covered < coverage).sum()) + 1
    kept = min(-(-max(needed, 2) // ROUNDED) * ROUNDED, most, size)
    return DraftVocabulary(order[:kept].sort().values, size)


def coverage_of(vocabulary: DraftVocabulary, counts: Tensor) -> float:
    return float(counts[vocabulary.ids].sum() / counts.sum().clamp(min=1))
