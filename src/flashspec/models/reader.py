"""A model beside how far it has read: its cache may be behind the text, never wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashspec.models.base import Features, KVCache, LanguageModel


class Reader:
    """One model's cache for a batch.

    cached: (B,) int64, the slots of each row that hold the text's own tokens. stale: host integer, at least
    `length - 1 - cached` in every row, so that catching up reads nothing back. lag: how stale it may be when a step
    begins, which is as stale as a step leaves it: 0 for a target, 1 for a drafter, which never reads its last token.
    features: the hidden states that are recorded of what it reads, for the slots that it holds.
    """

    def __init__(self, model: LanguageModel, batch_size: int, capacity: int, lag: int = 0) -> None:
        self.model = model
        self.lag = lag
        self._takes_part = False
        self.features: Features | None = None
        self.cache: KVCache = model.new_cache(batch_size, capacity)
        self.cached = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self.stale = 0

    def read(self, token_ids: Tensor, positions: Tensor, bound: int) -> Tensor:
        """Feed tokens (B, Q) at positions (B, Q), clamped to the cache; returns hidden states (B, Q, hidden)."""
        positions = positions.clamp(0, self.cache.capacity - 1)  # the last slot is never needed: it may hold anything
        hidden = self.feed(token_ids, positions, bound)
        torch.add(positions[:, -1], 1, out=self.cached)
        return hidden

    def feed(self, token_ids: Tensor, positions: Tensor, bound: int) -> Tensor:
        """The same at positions within the cache, for a caller who counts himself."""
        bound = min(bound, self.cache.capacity)
        return self.model.forward(token_ids, positions, self.cache, bound, features=self.features)

    def record(self, layers: Sequence[int], bound: int) -> None:
        """Record these layers' hidden states too. If that is new, a text of at most `bound` tokens is read again."""
        known = () if self.features is None else self.features.layers
        if not set(layers) <= set(known):
            rows, capacity = len(self.cached), self.cache.capacity
            self.features = Features.empty(self.model, sorted({*known, *layers}), rows, capacity)
            self.restart(bound)

    def read_on(self, tokens: Tensor, lengths: Tensor, bound: int, size: int) -> None:
        """Read the next `size` of tokens (B, T); rows near their last token, (B,) lengths, wait there."""
        positions = self.cached[:, None] + torch.arange(size, device=self.cached.device)
        positions = torch.minimum(positions, lengths[:, None] - 1)  # (B, size)
        self.read(tokens.gather(1, positions), positions, bound)
        self.rewind(lengths)

    def catch_up(self, tokens: Tensor, lengths: Tensor, bound: int, chunk: int = 512) -> None:
        """Be ready for a step: read tokens (B, T) up to the last committed one, exclusive, in chunks."""
        self.joins_step()
        while self.stale > self.lag:
            size = min(self.stale, chunk)
            self.read_on(tokens, lengths, bound, size)
            self.stale -= size

    def joins_step(self) -> None:
        """The host's note that the next step will leave this reader only `lag` behind."""
        self._takes_part = True

    def sits_out(self) -> None:
        """That it will not after all, though it has caught up."""
        self._takes_part = False

    def restart(self, bound: int, kept: int = 0) -> None:
        """Begin a text of at most `bound` tokens, of which the first `kept` are in the cache already."""
        self.cached.fill_(kept)
        self.stale = bound - 1 - kept
        self._takes_part = False

    def grow(self, capacity: int) -> None:
        """Make room for at least so many tokens; what was read stays."""
        if capacity > self.cache.capacity:
            old, self.cache = self.cache, self.model.new_cache(self.cached.shape[0], capacity)
            self.cache.keys[..., : old.capacity, :] = old.keys
            self.cache.values[..., : old.capacity, :] = old.values
            if self.features is not None:
                kept = self.features.buffer
                self.features = Features.empty(self.model, self.features.layers, len(kept), capacity)
                self.features.buffer[:, : kept.shape[1]] = kept

    def rewind(self, lengths: Tensor) -> None:
        """Forget what lies at or after the last committed token, (B,) lengths."""
        torch.minimum(self.cached, lengths - 1, out=self.cached)

    def keep_count_in(self, cached: Tensor) -> None:
        """Count in a tensor (B,) int64 of somebody else's from now on."""
        self.cached = cached.copy_(self.cached)

    @property
    def takes_part(self) -> bool:
        return self._takes_part

    def advance(self, emitted: int) -> bool:
        """The host's note that a step ended, in which no row grew by more than `emitted` tokens; whether `stale` counts
        them, so that it can be put right when the host knows better."""
        took_part, self._takes_part = self._takes_part, False
        self.stale = self.lag if took_part else self.stale + emitted
        return not took_part
