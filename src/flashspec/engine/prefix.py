"""What a conversation keeps between its turns: the caches of everything that was read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader


class PrefixCache:
    """One row's text and the readers that have read it. A reader is lent to one run at a time."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._readers: dict[int, tuple[Reader, int]] = {}  # id of the model -> reader, tokens it has surely read

    @torch.inference_mode()
    def borrow(self, model: LanguageModel, prompt: Sequence[int], lag: int) -> Reader:
        """A reader that already holds what `prompt` shares with the kept text."""
        reader, read = self._readers.pop(id(model), (None, 0))
        if reader is None:
            reader = Reader(model, 1, model.max_context, lag)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._text, prompt, strict=False)))
        kept = min(read, shared, len(prompt) - 1)
        reader.cached.fill_(kept)
        reader.stale = len(prompt) - 1 - kept
        return reader

    def keep(self, text: Sequence[int], readers: Sequence[Reader]) -> None:
        """Take the readers back after a run that ended well."""
        self._text = list(text)
        self._readers = {id(reader.model): (reader, len(text) - 1 - reader.stale) for reader in readers}
