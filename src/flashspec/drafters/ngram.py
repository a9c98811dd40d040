"""Prompt lookup (Saxena 2023): what followed the last occurrence of the text's last few tokens is proposed again.
Entirely on the device: the number of operations depends on neither the text nor a match."""

from __future__ import annotations

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.kernels import look_up


class NgramDrafter(Drafter):
    """Matches of the last min_ngram..max_ngram tokens; the longest wins, then the latest."""

    name = "ngram"

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram is {min_ngram}; it should be from 1 to max_ngram = {max_ngram}")
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def start(self, context: DraftContext) -> Proposer:
        return NgramProposer(self.max_ngram, self.min_ngram)


class NgramProposer(Proposer):
    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def propose(self, context: DraftContext, length: int) -> Draft:
        return Draft(*look_up(context.tokens, context.lengths, context.bound, length, self.max_ngram, self.min_ngram))
