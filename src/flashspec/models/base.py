"""What the engine asks of a network that scores tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(slots=True)
class KVCache:
    """Keys and values of every layer, one slot a text position.

    keys, values: (layers, B, kv_heads, capacity, head_dim). A slot holds what was last written there; nothing else
    says which slots are valid. Readers see slots at or before their own position, so a roll-back needs no write.
    """

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model over a cache with per-row positions.

    `forward` writes the keys and values of token_ids[b, i] at slot positions[b, i], lets it attend to the slots
    0..positions[b, i] of row b, and returns the hidden states that `logits` takes. Positions of a row ascend by 1,
    except that they may stay at a limit (0 or some last slot); a slot written twice in one call holds either value.
    Nothing is read back to the host.
    """

    vocab_size: int
    max_context: int
    num_layers: int
    device: torch.device
    dtype: torch.dtype

    def new_cache(self, batch_size: int, capacity: int) -> KVCache: ...

    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, bound: int, num_layers: int | None = None
    ) -> Tensor:
        """token_ids, positions: (B, Q) int64. bound: host integer, at least the largest position + 1 and at most the
        capacity, so that eager attention need not cover the whole buffer. num_layers: stop after the first so many
        layers (early exit). Returns the final-normed hidden states (B, Q, hidden)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., V) float32."""
        ...
