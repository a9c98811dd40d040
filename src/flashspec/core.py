"""The nouns that travel between rooms. B rows, γ draft tokens, V vocabulary entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class FlashSpecError(Exception):
    """Something a user can mend; the message is one sentence that says how."""


@contextmanager
def full_gpu_said() -> Iterator[None]:
    """torch.OutOfMemoryError, raised inside, as a FlashSpecError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FlashSpecError(
            "the GPU's memory is full: ask for fewer rows or a shorter text, take a smaller model or fewer "
            "drafters, or end what else runs there"
        ) from error


class FinishReason(IntEnum):
    """Why a row stopped; the integer is what the device writes."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3
    CANCELLED = 4


@dataclass(frozen=True, slots=True)
class Arm:
    """A drafter at a draft length; length 0 is plain decoding and names no drafter."""

    drafter: str
    length: int

    def __post_init__(self) -> None:
        if self.length < 0 or bool(self.drafter) != bool(self.length):
            raise ValueError(f"an arm is a drafter with length >= 1, or '' with 0: got {self.drafter!r}, {self.length}")

    def __str__(self) -> str:
        return f"{self.drafter}:{self.length}" if self.length else "plain"

    @classmethod
    def parse(cls, name: str) -> Arm:
        """`plain` or `drafter:length`; ValueError otherwise."""
        drafter, _, length = name.rpartition(":")
        if name == "plain":
            return PLAIN
        if not drafter or not length.isdecimal():
            raise ValueError(f"arm {name!r} should read 'plain' or 'drafter:length'")
        if int(length) < 1:
            raise ValueError(f"arm {name!r} drafts no token; write '{drafter}:1' or more, or 'plain' for no draft")
        return cls(drafter, int(length))


PLAIN = Arm("", 0)


@dataclass(slots=True)
class Draft:
    """What a drafter proposes.

    token_ids: (B, γ) int64. lengths: (B,) int64, how many of them row b really proposes, 0..γ.
    logits: (B, γ, V) float32, unnormalised log-probabilities that the tokens were drawn from; None: one-hot.
    faulty: (B,) bool, rows whose draft was cut short by NaN or by an id outside the vocabulary; None: none.
    """

    token_ids: Tensor
    lengths: Tensor
    logits: Tensor | None = None
    faulty: Tensor | None = None

    def to(self, device: torch.device) -> Draft:
        """On a device; itself where it is there already."""
        if self.token_ids.device == device:
            return self
        moved = (None if tensor is None else tensor.to(device) for tensor in (self.logits, self.faulty))
        return Draft(self.token_ids.to(device), self.lengths.to(device), *moved)

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> Draft:
        return cls(
            torch.zeros(batch_size, 0, dtype=torch.int64, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )


class Verdict(NamedTuple):
    """num_accepted: (B,) int64, draft tokens kept. next_token: (B,) int64, recovered or bonus token."""

    num_accepted: Tensor
    next_token: Tensor


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Log-probabilities under raw logits (B, Q, V), without temperature, penalties or cuts.

    tokens: (B, Q) float32, written by a verification, of the tokens that it keeps and the one after them. totals:
    (B, Q) float32, written as far, the logarithm of the sum of exponentials: what a logit less it is a log-probability.
    """

    logits: Tensor
    tokens: Tensor
    totals: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Likelihoods:
        empty = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        return cls(logits, empty, torch.empty_like(empty))


@dataclass(frozen=True, slots=True)
class RowStep:
    """One row of one step. drafted >= accepted; emitted counts the tokens that entered the text."""

    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: the arm, what each unfinished row did, and the seconds until the host knew, from its launch or the news
    of the step before. A caller slower than the device is part of them; reading a prompt beforehand is not."""

    arm: Arm
    rows: tuple[RowStep, ...]
    seconds: float

    @property
    def drafted(self) -> int:
        return sum(row.drafted for row in self.rows)

    @property
    def accepted(self) -> int:
        return sum(row.accepted for row in self.rows)

    @property
    def emitted(self) -> int:
        return sum(row.emitted for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The target's raw log-probability of an emitted token, and the most likely tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class GenerationResult:
    """What `SpeculativeEngine.generate` returns.

    output_ids: (B, longest) int64, new tokens only, padded with -1. texts: one a row where a tokenizer is there.
    finish_reasons: 'stop', 'length', 'error' or 'cancelled' a row. seconds: decoding wall time, prefill included.
    """

    output_ids: Tensor
    finish_reasons: list[str]
    steps: list[StepRecord]
    seconds: float
    texts: list[str] | None = None
    logprobs: list[list[TokenLogprobs]] | None = None
    seed: int = 0
    prompt_lengths: list[int] = field(default_factory=list)

    @property
    def n_tokens_generated(self) -> int:
        return int((self.output_ids >= 0).sum())

    @property
    def text(self) -> str:
        """The first row's text; ValueError without a tokenizer."""
        if self.texts is None:
            raise ValueError("this result has no text: the engine has no tokenizer")
        return self.texts[0]

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0.0 where nothing was drafted."""
        drafted = sum(step.drafted for step in self.steps)
        return sum(step.accepted for step in self.steps) / drafted if drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted a row per target forward."""
        forwards = sum(len(step.rows) for step in self.steps)
        return sum(step.emitted for step in self.steps) / forwards if forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens_generated / self.seconds if self.seconds > 0 else 0.0
