"""What the engine asks of a network that scores tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

LEAST_SLOTS = 1024  # a row, of a workspace's caches: kernels depend on how many
FIRST_ROWS = 64  # of an embedding, by which models are told apart
CORNER = (16, 128)  # rows and columns of every other matrix, by which revisions are


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


@dataclass(slots=True)
class Features:
    """Where a forward records hidden states, for drafter heads.

    layers: ascending; i is what enters layer i, num_layers the final-normed hidden states: what transformers calls
    hidden_states[i]. buffer: (B, capacity, len(layers) * hidden) in the model's dtype, a slot a text position, of which
    it holds the same as the cache.
    """

    layers: tuple[int, ...]
    buffer: Tensor

    @classmethod
    def empty(cls, model: LanguageModel, layers: Sequence[int], batch_size: int, capacity: int) -> Features:
        wrong = [layer for layer in layers if not 0 <= layer <= model.num_layers]
        if wrong:
            raise ValueError(f"layers are {list(layers)}; the model has hidden states 0 to {model.num_layers}")
        shape = (batch_size, capacity, len(layers) * model.hidden_size)
        return cls(tuple(layers), torch.zeros(shape, dtype=model.dtype, device=model.device))

    def record(self, layer: int, positions: Tensor, hidden: Tensor) -> None:
        """Keep hidden (B, Q, hidden) of text positions (B, Q), if the layer is one of ours."""
        if layer in self.layers:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            self._part(layer).index_put_((rows, positions), hidden)

    def at(self, layers: Sequence[int], positions: Tensor) -> Tensor:
        """(B, Q, len(layers) * hidden) of text positions (B, Q)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        if tuple(layers) == self.layers:
            return self.buffer[rows, positions]
        return torch.cat([self._part(layer)[rows, positions] for layer in layers], -1)

    @property
    def by_layer(self) -> Tensor:
        """(B, capacity, len(self.layers), hidden)"""
        return self.buffer.view(*self.buffer.shape[:2], len(self.layers), -1)

    def places(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Where they are in `by_layer`."""
        return tuple(map(self.layers.index, layers))

    def _part(self, layer: int) -> Tensor:
        return self.by_layer[:, :, self.layers.index(layer)]


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model over a cache with per-row positions.

    `forward` writes the keys and values of token_ids[b, i] at slot positions[b, i], lets it attend to the slots
    0..positions[b, i] of row b, and returns the hidden states that `logits` takes. Positions of a row ascend by 1,
    except that they may stay at a limit (0 or some last slot); a slot written twice in one call holds either value.
    Nothing is read back to the host.
    """

    vocab_size: int
    hidden_size: int
    max_context: int
    num_layers: int
    device: torch.device
    dtype: torch.dtype

    def new_cache(self, batch_size: int, capacity: int) -> KVCache: ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """token_ids, positions: (B, Q) int64. bound: host integer, at least the largest position + 1 and at most the
        capacity, so that eager attention need not cover the whole buffer. num_layers: stop after the first so many
        layers (early exit). features: where the hidden states of these tokens are recorded too, at their positions; not
        together with num_layers. Returns the final-normed hidden states (B, Q, hidden)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., V) float32."""
        ...


class Vocabulary(NamedTuple):
    """embedding, lm_head: (V, hidden), one tensor where they are tied."""

    embedding: Tensor
    lm_head: Tensor


class Sample(NamedTuple):
    """A few of a model's weights, by which it is told apart from others and from its own revisions.

    outer: the norm ahead of the LM head and the first rows of the embedding. layers: a corner of each of the layers'
    matrices, as q, k, v, output, gate, up, down of one layer behind the other. Both are flat.
    """

    outer: Tensor
    layers: Tensor

    @classmethod
    def of(cls, norm: Tensor, embedding: Tensor, matrices: Iterable[Tensor]) -> Sample:
        rows, columns = CORNER
        corners = [matrix[:rows, :columns].flatten() for matrix in matrices]
        return cls(torch.cat([norm, embedding[:FIRST_ROWS].flatten()]), torch.cat(corners))


@runtime_checkable
class SharesVocabulary(LanguageModel, Protocol):
    """A model whose embedding and LM head a drafter may use as its own."""

    def vocabulary(self) -> Vocabulary:
        """On the model's device in its dtype; copies where the model keeps them packed."""
        ...

    def sample(self) -> Sample:
        """On the model's device in its dtype, at little cost: no whole matrix is read."""
        ...
