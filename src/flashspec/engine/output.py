"""From steps to what a caller sees: text, stop strings, a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from flashspec.core import FinishReason, GenerationResult, StepRecord, TokenLogprobs
from flashspec.engine.outcome import News
from flashspec.models.tokenizer import TextStream


class Chunk(NamedTuple):
    """What one step added to one row of a stream. text is empty without a tokenizer, and while a multi-byte character
    or a possible stop string is incomplete. finish_reason is set on a row's last chunk."""

    row: int
    token_ids: tuple[int, ...]
    text: str
    record: StepRecord
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass(slots=True)
class RowText:
    """One row's output so far; text that may be the beginning of a stop string is held back."""

    stop: tuple[str, ...]
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    held: str = ""
    finish: FinishReason = FinishReason.RUNNING
    cut: bool = False

    def add(self, news: News, row: int) -> tuple[int, str]:
        """Take a step's tokens; returns how many of them count and the text that is certain now."""
        token_ids, logprobs, finish = news.token_ids[row], news.logprobs[row], news.finish[row]
        count, released = len(token_ids), ""
        if self.stream is not None:
            for number, token_id in enumerate(token_ids, 1):
                released += self._release(self.stream.push([token_id]))
                if self.cut:
                    count, finish = number, FinishReason.STOP
                    break
        self.token_ids.extend(token_ids[:count])
        if logprobs:
            self.logprobs.extend(logprobs[:count])
        self.finish = finish
        if finish is not FinishReason.RUNNING and not self.cut:
            released += self.close()
        return count, released

    def close(self) -> str:
        """The text held back, when no more will come."""
        tail = self.stream.flush() if self.stream is not None else ""
        released = self._release(tail)
        if not self.cut:
            released += self.held
            self.text += self.held
        self.held = ""
        return released

    def _release(self, piece: str) -> str:
        pending = self.held + piece
        hits = [at for at in (pending.find(stop) for stop in self.stop) if at >= 0]
        if hits:
            pending, self.held, self.cut = pending[: min(hits)], "", True
        else:
            keep = max((_overlap(pending, stop) for stop in self.stop), default=0)
            pending, self.held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += pending
        return pending


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def make_result(
    rows: Sequence[RowText],
    steps: list[StepRecord],
    seconds: float,
    seed: int,
    prompts: Sequence[Sequence[int]],
    with_text: bool,
    with_logprobs: bool,
) -> GenerationResult:
    longest = max(len(row.token_ids) for row in rows)
    padded = [row.token_ids + [-1] * (longest - len(row.token_ids)) for row in rows]
    return GenerationResult(
        output_ids=torch.from_numpy(np.array(padded, np.int64)),
        finish_reasons=[row.finish.name.lower() for row in rows],
        steps=steps,
        seconds=seconds,
        texts=[row.text for row in rows] if with_text else None,
        logprobs=[row.logprobs for row in rows] if with_logprobs else None,
        seed=seed,
        prompt_lengths=[len(prompt) for prompt in prompts],
    )
