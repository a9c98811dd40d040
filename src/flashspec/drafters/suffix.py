"""Suffix matching: what followed the text's last few tokens before, in this request and, when asked to remember, in
earlier ones. A host drafter; it proposes as many tokens as are expected to pay.

How far a prediction can be trusted is learned at no cost in target forwards: every token that enters the text, the
prompt's included, is first predicted, and the outcome is counted by match length and by agreement.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer

AT_ONCE = 64  # tokens of all rows that are read while the device works, in 0.3 ms; an eighth of what is left, if more
Prediction = tuple[int, tuple[int, int]]  # the token, and the class that its trust is counted in


class SuffixIndex:
    """Next-token counts behind every run of min_match..max_match tokens."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self.min_match = min_match
        self.max_match = max_match
        self._following: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, recent: Sequence[int], token_id: int) -> None:
        """Count token_id behind the last tokens of `recent`."""
        for size in range(self.min_match, min(self.max_match, len(recent)) + 1):
            counts = self._following.setdefault(tuple(recent[-size:]), {})
            counts[token_id] = counts.pop(token_id, 0) + 1  # re-inserted: the latest token is the last key

    def predict(self, recent: Sequence[int]) -> Prediction | None:
        """The most frequent follower of the longest match, the latest among equals."""
        for size in range(min(self.max_match, len(recent)), self.min_match - 1, -1):
            counts = self._following.get(tuple(recent[-size:]))
            if counts:
                best = max(reversed(counts), key=counts.__getitem__)
                share = counts[best] / sum(counts.values())
                seen = min(counts[best], 3)
                return best, (size, 4 * seen + int(3.99 * share))
        return None


class Trust:
    """The observed hit rate of each class of prediction."""

    def __init__(self) -> None:
        self._hits: dict[tuple[int, int], float] = {}
        self._trials: dict[tuple[int, int], float] = {}

    def record(self, kind: tuple[int, int], hit: bool) -> None:
        self._hits[kind] = self._hits.get(kind, 0.0) + hit
        self._trials[kind] = self._trials.get(kind, 0.0) + 1

    def rate(self, kind: tuple[int, int]) -> float:
        """Beta(1, 1) posterior mean, so that a class without evidence counts as one half."""
        return (self._hits.get(kind, 0.0) + 1) / (self._trials.get(kind, 0.0) + 2)


class SuffixDrafter(Drafter):
    """remember: also match texts of earlier requests; leave it off where requests must not learn of each other."""

    name = "suffix"
    on_host = True
    # It stops by itself where more tokens would not pay. With the token before them, 16 tokens: as many as keep a
    # token's bits the same, whatever shares its forward, on a GPU.
    lengths = (15,)

    def __init__(self, min_match: int = 1, max_match: int = 6, remember: bool = False) -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(f"min_match is {min_match}; it should be from 1 to max_match = {max_match}")
        self.min_match = min_match
        self.max_match = max_match
        self.trust = Trust()
        self.memory = SuffixIndex(min_match, max_match) if remember else None

    def start(self, context: DraftContext) -> Proposer:
        return SuffixProposer(self, len(context.texts))

    def learn(self, texts: Sequence[Sequence[int]]) -> None:
        if self.memory is not None:
            for text in texts:
                for end in range(1, len(text)):
                    self.memory.add(text[max(0, end - self.max_match) : end], text[end])


class SuffixProposer(Proposer):
    def __init__(self, drafter: SuffixDrafter, rows: int) -> None:
        self.drafter = drafter
        self.indexes = [SuffixIndex(drafter.min_match, drafter.max_match) for _ in range(rows)]
        self.indexed = [1] * rows  # a first token follows nothing

    def prepare(self, context: DraftContext) -> None:
        for row, text in enumerate(context.texts):
            self._read(row, text, len(text))

    def _read(self, row: int, text: list[int], stop: int) -> None:
        for end in range(self.indexed[row], stop):
            recent = text[max(0, end - self.drafter.max_match) : end]
            prediction = self._predict(row, recent)
            if prediction is not None:
                self.drafter.trust.record(prediction[1], prediction[0] == text[end])
            self.indexes[row].add(recent, text[end])
        self.indexed[row] = stop

    def expects_nothing(self, context: DraftContext, length: int) -> bool:
        """While a text is still being read it does: the device should not wait for that."""
        left = sum(map(len, context.texts)) - sum(self.indexed)
        most = budget = max(AT_ONCE, left // 8)
        for row, text in enumerate(context.texts):
            before = self.indexed[row]
            self._read(row, text, min(before + budget, len(text)))
            budget -= self.indexed[row] - before
        return left > most or not any(self._drafts(context, length))

    def propose(self, context: DraftContext, length: int) -> Draft:
        rows = self._drafts(context, length)
        width = max(len(row) for row in rows)
        padded = [row + [0] * (width - len(row)) for row in rows]
        token_ids = torch.tensor(padded, dtype=torch.int64).view(len(rows), width)
        return Draft(token_ids, torch.tensor([len(row) for row in rows]))

    def _drafts(self, context: DraftContext, length: int) -> list[list[int]]:
        """Of every row; none at all where a rival is expected to do better, or a step without a draft."""
        written = [
            self._write(row, text, length, context.token_cost) if active else ([], 0.0)
            for row, (text, active) in enumerate(zip(context.texts, context.active, strict=True))
        ]
        rows, width = [draft for draft, _ in written], max(len(draft) for draft, _ in written)
        running = sum(context.active)
        hoped = running + sum(expected for _, expected in written)
        worth = hoped >= running * max(context.rival, 1 + context.token_cost * width)
        return rows if worth else [[] for _ in rows]

    def _predict(self, row: int, recent: Sequence[int]) -> Prediction | None:
        own = self.indexes[row].predict(recent)
        memory = self.drafter.memory
        remembered = memory.predict(recent) if memory is not None else None
        if own is None or (remembered is not None and remembered[1] > own[1]):
            return remembered
        return own

    def _write(self, row: int, text: list[int], length: int, token_cost: float) -> tuple[list[int], float]:
        """Tokens, and how many are expected to be kept, for as long as one more raises the expected tokens per second:
        with S expected so far from k tokens and a chance P that the next is reached and kept, that is while
        P (1 + c k) > c (1 + S)."""
        draft: list[int] = []
        recent = text[-self.drafter.max_match :]
        reached, expected = 1.0, 0.0
        while len(draft) < length:
            prediction = self._predict(row, recent)
            if prediction is None:
                break
            reached *= self.drafter.trust.rate(prediction[1])
            if reached * (1 + token_cost * len(draft)) <= token_cost * (1 + expected):
                break
            expected += reached
            draft.append(prediction[0])
            recent = [*recent[-self.drafter.max_match + 1 :], prediction[0]]
        return draft, expected
