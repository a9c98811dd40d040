"""One batch's state: everything a step reads and writes, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashspec.core import Draft, FinishReason, Verdict
from flashspec.engine.outcome import Logprobs, Outcome
from flashspec.engine.prefix import PrefixCache
from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader
from flashspec.sampling.sampler import Sampler

SLACK = 65  # a draft of 64 and one more may be written behind the last row's end


@dataclass(slots=True)
class DecodeState:
    """B rows of text, left-aligned in tokens (B, capacity + SLACK) int64; what lies behind lengths is garbage.

    lengths, limits, finish: (B,) int64, the committed length, the length at which a row ends, a FinishReason.
    stop_ids: (K,) int64. num_logprobs: None, or how many top tokens to report. readers: the caches, the target's first.
    The rest is the host's view: bound >= every length, texts the committed tokens, active the rows still being written.
    """

    tokens: Tensor
    lengths: Tensor
    limits: Tensor
    finish: Tensor
    stop_ids: Tensor
    capacity: int
    sampler: Sampler
    num_logprobs: int | None
    bound: int
    texts: list[list[int]]
    active: list[bool]
    token_cost: float = 0.1
    memory: PrefixCache | None = None
    readers: list[Reader] = field(default_factory=list)

    @classmethod
    @torch.inference_mode()
    def create(
        cls,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_ids: Sequence[int],
        model: LanguageModel,
        sampler: Sampler,
        num_logprobs: int | None = None,
        token_cost: float = 0.1,
        memory: PrefixCache | None = None,
    ) -> DecodeState:
        """Rows of prompt ids, none empty, each with the text length at which it must stop. memory: a conversation's
        caches, for a single row."""
        device, rows, capacity = model.device, len(prompts), max(limits)
        tokens = torch.zeros(rows, capacity + SLACK, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64, device=device)
        state = cls(
            tokens=tokens,
            lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
            limits=torch.tensor(list(limits), device=device),
            finish=torch.zeros(rows, dtype=torch.int64, device=device),
            stop_ids=torch.tensor(list(stop_ids), dtype=torch.int64, device=device),
            capacity=capacity,
            sampler=sampler,
            num_logprobs=num_logprobs,
            bound=max(map(len, prompts)),
            texts=[list(prompt) for prompt in prompts],
            active=[True] * rows,
            token_cost=token_cost,
            memory=memory,
        )
        state._open_reader(model, lag=0)
        return state

    @property
    def target(self) -> Reader:
        return self.readers[0]

    def add_reader(self, model: LanguageModel) -> Reader:
        return self._open_reader(model, lag=1)

    def _open_reader(self, model: LanguageModel, lag: int) -> Reader:
        capacity = min(self.capacity, model.max_context)
        if self.memory is not None:
            reader = self.memory.borrow(model, self.texts[0], self.bound, capacity, lag)
        else:
            reader = Reader(model, len(self.texts), capacity, lag)
            reader.stale = self.bound - 1
        self.readers.append(reader)
        return reader

    def prepare(self) -> None:
        """Prefill, or nothing: the target has read all but the last committed token when a step begins."""
        self.target.catch_up(self.tokens, self.lengths, self.bound)

    def choose(self, logits: Tensor, offset: int) -> tuple[Tensor, Tensor | None]:
        return self.sampler.choose(logits, self.lengths + offset)

    def score(self, draft: Draft) -> Tensor:
        """The target's logits (B, γ + 1, V) after the last committed token and each draft token."""
        last = self.tokens.gather(1, self.lengths[:, None] - 1)  # (B, 1)
        window = torch.cat([last, draft.token_ids], 1)  # (B, γ + 1)
        offsets = torch.arange(window.shape[1], device=window.device)
        positions = self.lengths[:, None] - 1 + offsets
        hidden = self.target.read(window, positions, self.bound + window.shape[1] - 1)
        return self.target.model.logits(hidden)

    def commit(self, draft: Draft, verdict: Verdict, failed: Tensor, logits: Tensor) -> Outcome:
        """Append what was accepted and the token after it, up to a stop token or the row's limit; move the lengths.

        failed: (B,) bool, rows whose logits (B, γ + 1, V) are not finite: they end here, and grow by nothing."""
        gamma = draft.token_ids.shape[1]
        index = torch.arange(gamma + 1, device=self.tokens.device)
        emitted = torch.cat([draft.token_ids, verdict.next_token[:, None]], 1)  # (B, γ + 1)
        emitted = emitted.scatter(1, verdict.num_accepted[:, None], verdict.next_token[:, None])
        logprobs = None if self.num_logprobs is None else Logprobs.of(logits, emitted, self.num_logprobs)

        running = self.finish == FinishReason.RUNNING
        growing = running & ~failed
        num_emitted = torch.minimum(verdict.num_accepted + 1, self.limits - self.lengths)
        stops = (emitted[..., None] == self.stop_ids).any(-1) & (index < num_emitted[:, None])  # (B, γ + 1)
        before_stop = (stops.long().cumsum(1) == 0).sum(1)  # tokens ahead of the first stop token
        num_emitted = torch.minimum(num_emitted, before_stop + 1) * growing
        lengths = self.lengths + num_emitted
        stopped, full = growing & (before_stop <= gamma), growing & (lengths >= self.limits)
        ended = torch.where(stopped, FinishReason.STOP.value, full * FinishReason.LENGTH.value)
        finish = torch.where(growing, ended, torch.where(running, FinishReason.ERROR.value, self.finish))
        drafted = torch.where(finish > 0, torch.minimum(draft.lengths, num_emitted), draft.lengths)
        faulty = torch.zeros_like(finish) if draft.faulty is None else (draft.faulty & running).long()

        self.tokens.scatter_(1, self.lengths[:, None] + index, emitted)
        self.sampler.transforms.count(emitted, index < num_emitted[:, None])
        self.lengths.copy_(lengths)
        self.finish.copy_(finish)
        for reader in self.readers:
            reader.rewind(lengths)
        accepted = torch.minimum(verdict.num_accepted, num_emitted)
        return Outcome.pack(drafted, accepted, num_emitted, finish, faulty, emitted, logprobs)
