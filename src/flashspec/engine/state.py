"""One batch's state: everything a step reads and writes, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flashspec.core import Draft, FinishReason, Likelihoods, Verdict
from flashspec.engine.outcome import Logprobs, Outcome
from flashspec.engine.prefix import PrefixCache, shared_length
from flashspec.kernels import commit, window
from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader
from flashspec.sampling.sampler import Sampler

SLACK = 65  # a draft of 64 and one more may be written behind the last row's end
READERS = 16  # the most models that read a text, the target included
# Tokens of a captured catching up: 16 by the products of a step, more by cuBLAS's, for few rows and a small cache, all
# of whose slots a graph attends to.
CHUNKS = 16, 128, 256
MOST_IN_CHUNK, MOST_SLOTS = 512, 4096
LONG_READ = 32  # tokens: a prompt, or what was written while a drafter was away


@dataclass(slots=True)
class DecodeState:
    """B rows of text, left-aligned in tokens (B, capacity + SLACK) int64; what lies behind lengths is garbage.

    lengths, limits, finish: (B,) int64, the committed length, the length at which a row ends, a FinishReason.
    stop_ids: (B, K) int64, padded with -1. cached: (READERS, B) int64, what each reader holds. num_logprobs: None, or
    how many top tokens to report. readers: the caches, the target's first. The rest is the host's view: bound >= every
    length, texts the committed tokens, active the rows still being written, ends their limits. `allocate` makes the
    tensors, `admit` begins a batch in them, so that they may outlive it. long_reads: how often a model caught up with
    more of the text than a step leaves unread. capture: runs work on the device, by name; where it is set the work is a
    CUDA graph from its second time on.
    """

    tokens: Tensor
    lengths: Tensor
    limits: Tensor
    finish: Tensor
    stop_ids: Tensor
    cached: Tensor
    capacity: int
    model: LanguageModel
    bound: int = 1
    sampler: Sampler = field(init=False)
    num_logprobs: int | None = None
    texts: list[list[int]] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    token_cost: float = 0.1
    rival: float = 1.0
    long_reads: int = 0
    memory: PrefixCache | None = None
    readers: list[Reader] = field(default_factory=list)
    capture: Callable[[str, Callable[[], None]], None] | None = None

    @classmethod
    @torch.inference_mode()
    def allocate(cls, model: LanguageModel, rows: int, capacity: int, num_stops: int) -> DecodeState:
        """Room for rows of `capacity` tokens with so many stop tokens each; all of them vacant."""

        def column(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int64, device=model.device)

        return cls(
            tokens=torch.zeros(rows, capacity + SLACK, dtype=torch.int64, device=model.device),
            lengths=column(1),
            limits=column(1),
            finish=column(FinishReason.CANCELLED),
            stop_ids=torch.full((rows, num_stops), -1, dtype=torch.int64, device=model.device),
            cached=torch.zeros(READERS, rows, dtype=torch.int64, device=model.device),
            capacity=capacity,
            model=model,
        )

    @classmethod
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
        """A state of one batch's own."""
        state = cls.allocate(model, len(prompts), max(limits), len(stop_ids))
        state.admit(prompts, limits, stop_ids, sampler, num_logprobs, token_cost, memory)
        return state

    @torch.inference_mode()
    def admit(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_ids: Sequence[int],
        sampler: Sampler,
        num_logprobs: int | None = None,
        token_cost: float = 0.1,
        memory: PrefixCache | None = None,
    ) -> None:
        """Begin a batch: rows of prompt ids, none empty, each with the text length at which it must stop; rows beyond
        them stay vacant. memory: a conversation's caches, for a single row."""
        vacant = len(self.tokens) - len(prompts)
        texts = [list(prompt) for prompt in prompts] + [[0] for _ in range(vacant)]
        width = max(map(len, texts))
        padded = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        stops = [*stop_ids, *[-1] * (self.stop_ids.shape[1] - len(stop_ids))]
        self.tokens[:, :width] = padded.to(self.tokens.device)
        self.ends = [*limits, *[1] * vacant]
        self.lengths.copy_(torch.tensor([len(text) for text in texts]))
        self.limits.copy_(torch.tensor(self.ends))
        self.finish.copy_(torch.tensor([FinishReason.RUNNING] * len(prompts) + [FinishReason.CANCELLED] * vacant))
        self.stop_ids.copy_(torch.tensor(stops, dtype=torch.int64))
        kept = self._shared_with(texts[0], memory)
        self.texts, self.active, self.bound = texts, [True] * len(prompts) + [False] * vacant, width
        self.sampler, self.num_logprobs, self.token_cost, self.memory = sampler, num_logprobs, token_cost, memory
        for reader, length in zip(self.readers, kept, strict=True):
            reader.restart(width, length)
        if not self.readers:
            self._open_reader(self.model, lag=0)

    def _shared_with(self, prompt: list[int], memory: PrefixCache | None) -> list[int]:
        """How much of a prompt each reader still holds: something where it goes on with the same conversation."""
        if memory is None or memory is not self.memory:
            return [0] * len(self.readers)
        text = self.texts[0]
        shared = min(shared_length(text, prompt), len(prompt) - 1)
        return [min(max(0, len(text) - 1 - reader.stale), shared) for reader in self.readers]

    @property
    def target(self) -> Reader:
        return self.readers[0]

    def add_reader(self, model: LanguageModel, lag: int = 1, make: type[Reader] = Reader) -> Reader:
        return self._open_reader(model, lag, make)

    @torch.inference_mode()
    def record_features(self, layers: Sequence[int]) -> None:
        self.target.record(layers, self.bound)

    def _open_reader(self, model: LanguageModel, lag: int, make: type[Reader] = Reader) -> Reader:
        capacity = min(self.capacity, model.max_context)
        if self.memory is not None and self.capture is None:
            reader = self.memory.borrow(model, self.texts[0], self.bound, capacity, lag, make)
        else:
            reader = make(model, len(self.texts), capacity, lag)
            reader.restart(self.bound)
        if len(self.readers) == READERS:
            raise ValueError(f"more than {READERS - 1} drafters with models of their own")
        reader.keep_count_in(self.cached[len(self.readers)])
        self.readers.append(reader)
        return reader

    def catch_up(self, reader: Reader) -> None:
        """Have a model read what it has not seen of the text."""
        self.long_reads += reader.stale > LONG_READ
        if self.capture is None or reader.stale - reader.lag > 2 * self.chunks[-1]:
            reader.catch_up(self.tokens, self.lengths, self.bound)
            return
        reader.joins_step()
        while reader.stale > reader.lag:
            size = next(size for size in self.chunks if size >= min(reader.stale - reader.lag, self.chunks[-1]))
            self.capture(f"catch up {self.readers.index(reader)} by {size}", partial(self._read_on, reader, size))
            reader.stale = max(reader.stale - size, 0)

    def _read_on(self, reader: Reader, size: int) -> None:
        """With the bound of when it runs: a capture has another."""
        reader.read_on(self.tokens, self.lengths, self.bound, size)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of how many tokens a captured catching up may be."""
        most = MOST_IN_CHUNK // self.tokens.shape[0] if self.capacity <= MOST_SLOTS else 0
        return CHUNKS[0], *(size for size in CHUNKS[1:] if size <= most)

    def prepare(self) -> None:
        """Prefill, or nothing: the target has read all but the last committed token when a step begins."""
        self.catch_up(self.target)

    @property
    def one_hot_drafts(self) -> bool:
        return self.sampler.one_hot_drafts

    def draw(self, logits: Tensor, draft: Draft, offset: int, part: Tensor | None = None, least: int = 1) -> None:
        self.sampler.draw(logits, draft, offset, self.lengths, self.model.vocab_size, part, least)

    def score(self, draft: Draft) -> Tensor:
        """The target's logits (B, γ + 1, V) after the last committed token and each draft token."""
        reader, bound = self.target, self.bound + draft.token_ids.shape[1]
        capacity = reader.cache.capacity
        token_ids, positions = window(self.tokens, self.lengths, draft.token_ids, capacity, reader.cached)
        return reader.model.logits(reader.feed(token_ids, positions, bound))

    def likelihoods(self, logits: Tensor) -> Likelihoods | None:
        """For a verification to fill, where log-probabilities are asked for."""
        return None if self.num_logprobs is None else Likelihoods.of(logits)

    def commit(self, draft: Draft, verdict: Verdict, failed: Tensor, likelihoods: Likelihoods | None) -> Outcome:
        """Append what was accepted and the token after it, up to a stop token or the row's limit; move the lengths.

        failed: (B,) bool, rows whose logits are not finite: they end behind what was accepted."""
        packed = commit(
            draft.token_ids,
            draft.lengths,
            *verdict,
            failed,
            draft.faulty,
            self.tokens,
            self.lengths,
            self.limits,
            self.finish,
            self.stop_ids,
            self.cached,
        )
        outcome = Outcome(packed)
        if likelihoods is not None and self.num_logprobs is not None:
            outcome.logprobs = Logprobs.of(likelihoods, outcome.token_ids, self.num_logprobs)
        self.sampler.transforms.count(outcome.token_ids, outcome.num_emitted)
        return outcome
