"""What a conversation keeps between its turns: the caches of everything that was read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader

ROUND = 1024  # slots that a cache grows by


def shared_length(text: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


class PrefixCache:
    """One row's text and the readers that have read it. A reader is lent to one run at a time."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._readers: dict[tuple[int, int], tuple[Reader, int]] = {}  # (id of the model, lag) -> reader, tokens read

    @torch.inference_mode()
    def borrow(
        self,
        model: LanguageModel,
        text: Sequence[int],
        bound: int,
        capacity: int,
        lag: int,
        make: type[Reader] = Reader,
    ) -> Reader:
        """A reader with room for `capacity` tokens that already holds what `text` shares with the kept one; its row is
        at most `bound` long."""
        reader, read = self._readers.pop((id(model), lag), (None, 0))
        room = min(-(-capacity // ROUND) * ROUND, model.max_context)
        if reader is None:
            reader = make(model, 1, room, lag)
        reader.grow(room)
        reader.restart(bound, min(read, shared_length(self._text, text), len(text) - 1))
        return reader

    def keep(self, text: Sequence[int], readers: Sequence[Reader]) -> None:
        """Take readers back after a run that ended well."""
        self._text = list(text)
        self._readers = {
            (id(reader.model), reader.lag): (reader, max(0, len(text) - 1 - reader.stale)) for reader in readers
        }
