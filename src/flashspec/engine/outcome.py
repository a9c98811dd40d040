"""What a step did: packed on the device, unpacked on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from flashspec.core import FinishReason, Likelihoods, RowStep, TokenLogprobs
from flashspec.kernels.reference_fused import HEAD  # columns ahead of the tokens

IN_FLIGHT = 2  # steps, at the most, whose outcome the host has not read

_REASONS = tuple(FinishReason)
_row_step = cache(RowStep)  # most rows do the same: one object for all of them, 0.2 µs a row in place of 1.3


@dataclass(frozen=True, slots=True)
class News:
    """What a step did to its B rows, on the host: a list a field, since an object a row took 6 µs for each of 1,024.

    token_ids, logprobs: of what entered the text."""

    steps: list[RowStep]
    finish: list[FinishReason]
    token_ids: list[tuple[int, ...]]
    logprobs: list[tuple[TokenLogprobs, ...]]
    faulty: bool


@dataclass(slots=True)
class Logprobs:
    """Raw log-probabilities of a step's tokens (B, γ + 1), and the n most likely ones (B, γ + 1, n)."""

    token_ids: Tensor
    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    @classmethod
    def of(cls, likelihoods: Likelihoods, token_ids: Tensor, count: int) -> Logprobs:
        """likelihoods: as a verification left them, token_ids: (B, γ + 1) int64, what it kept."""
        logits, chosen = likelihoods.logits, likelihoods.tokens
        if count == 0:
            none = chosen.new_empty(*chosen.shape, 0)
            return cls(token_ids, chosen, none.long(), none)
        top = logits.topk(min(count, logits.shape[-1]), dim=-1)
        return cls(token_ids, chosen, top.indices, top.values.float() - likelihoods.totals[..., None])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token_ids, self.chosen, self.top_ids, self.top

    def map(self, change: Callable[[Tensor], Tensor]) -> Logprobs:
        return Logprobs(*map(change, self.tensors))

    def fetch(self) -> list[tuple[TokenLogprobs, ...]]:
        rows = zip(*(column.tolist() for column in self.tensors), strict=True)
        return [
            tuple(
                TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
                for token_id, logprob, ids, values in zip(*row, strict=True)
            )
            for row in rows
        ]


@dataclass(slots=True)
class Outcome:
    """packed: what `kernels.commit` returns, (B, HEAD + γ + 1) int64: one copy to the host."""

    packed: Tensor
    logprobs: Logprobs | None = None
    letters: deque[Letter] = field(default_factory=deque)

    @property
    def token_ids(self) -> Tensor:
        """(B, γ + 1) int64, of which the first num_emitted count."""
        return self.packed[:, HEAD:]

    @property
    def num_emitted(self) -> Tensor:
        return self.packed[:, 2]

    @property
    def width(self) -> int:
        """The most tokens that a row may have grown by."""
        return self.packed.shape[1] - HEAD

    def post(self) -> Letter:
        """Send it to the host; from a GPU through pinned memory, beside whatever the device does next. Where the same
        outcome is posted again and again, as a graph's is, its letters are used again."""
        if self.packed.device.type == "cpu":
            return Letter(self, None)
        letter = self.letters.popleft() if len(self.letters) == IN_FLIGHT else self._letter()
        self.letters.append(letter)
        letter.write(self)
        return letter

    def _letter(self) -> Letter:
        def room(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

        copied = Outcome(room(self.packed), None if self.logprobs is None else self.logprobs.map(room))
        return Letter(copied, torch.cuda.Event())  # type: ignore[no-untyped-call]

    def read(self) -> News:
        """What it says; of an outcome on the host."""
        drafted, accepted, emitted, finish, faulty, *columns = self.packed.T.tolist()
        logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(emitted)
        if self.logprobs is not None:
            logprobs = [row[:count] for row, count in zip(self.logprobs.fetch(), emitted, strict=True)]
        return News(
            steps=list(map(_row_step, drafted, accepted, emitted)),
            finish=[_REASONS[reason] for reason in finish],
            token_ids=[row[:count] for row, count in zip(zip(*columns, strict=True), emitted, strict=True)],
            logprobs=logprobs,
            faulty=any(faulty),
        )


@dataclass(slots=True)
class Letter:
    """An outcome on its way to the host."""

    outcome: Outcome
    arrived: torch.cuda.Event | None

    def write(self, outcome: Outcome) -> None:
        self.outcome.packed.copy_(outcome.packed, non_blocking=True)
        if outcome.logprobs is not None and self.outcome.logprobs is not None:
            for copied, tensor in zip(self.outcome.logprobs.tensors, outcome.logprobs.tensors, strict=True):
                copied.copy_(tensor, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def is_here(self) -> bool:
        """Whether the device was done with it before anybody waited."""
        return self.arrived is not None and bool(self.arrived.query())  # type: ignore[no-untyped-call]

    def fetch(self) -> News:
        """Wait for it and read it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.outcome.read()
