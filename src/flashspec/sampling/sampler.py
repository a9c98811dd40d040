"""The sampling side of a batch: a request's settings as tensors, draft choices and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flashspec.config import SamplingConfig
from flashspec.core import Draft, Likelihoods, Verdict
from flashspec.kernels import choose_tokens, verify_logits
from flashspec.sampling.noise import Purpose
from flashspec.sampling.processors import NEVER, Transforms

STREAM_STRIDE = 0x9E3779B97F4A7C15  # far apart, so that stream 1 of one seed is not stream 0 of the next


@dataclass(slots=True)
class Sampler:
    """One batch's settings. seeds: (B,) int64, a stream a row."""

    config: SamplingConfig
    transforms: Transforms
    seeds: Tensor

    def signature(self) -> Hashable:
        """Equal for samplers whose steps are the same operations on other numbers."""
        config = self.config
        described = tuple((name, _describe(value)) for name, value in self._parts())
        return config.variant, config.typical_epsilon, config.typical_delta, described

    def clone(self) -> Sampler:
        """A copy with tensors of its own."""
        copies: dict[str, Any] = {name: value.clone() for name, value in self._parts() if isinstance(value, Tensor)}
        return Sampler(self.config, seeds=copies.pop("seeds"), transforms=replace(self.transforms, **copies))

    def assign(self, other: Sampler) -> None:
        """Take the numbers of a sampler of the same signature, in place."""
        self.config = other.config
        for (_, mine), (_, theirs) in zip(self._parts(), other._parts(), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)

    def _parts(self) -> list[tuple[str, Any]]:
        transforms = self.transforms
        return [("seeds", self.seeds), *((f.name, getattr(transforms, f.name)) for f in fields(transforms))]

    @property
    def one_hot_drafts(self) -> bool:
        """Whether drafts count as certain, whatever they were drawn from."""
        return self.transforms.all_greedy or self.config.variant != "rejection"

    def draw(
        self,
        logits: Tensor,
        draft: Draft,
        offset: int,
        lengths: Tensor,
        vocab_size: int,
        part: Tensor | None = None,
        least: int = 1,
    ) -> None:
        """Draw token `offset` of a draft, which decides text position lengths + offset, from a drafter's logits (B, V),
        as `choose_tokens` says. part: (V',) int64, where logits (B, V') are of these tokens only: the others have
        q = 0. Penalties do not bend drafts: any q keeps the text exact."""
        transforms, bias, floors = self.transforms, self.transforms.bias, None
        if part is not None and not (transforms.all_greedy and bias is None):
            everything = torch.full((len(logits), vocab_size), NEVER, dtype=torch.float32, device=logits.device)
            logits, part = everything.index_copy_(1, part, logits.float()), None
        if transforms.cuts and not transforms.all_greedy:
            logits, bias = logits if bias is None else logits.float() + bias, None
            floors = transforms.floors(logits[:, None])
        purpose = Purpose.TOKEN if self.config.variant == "coupled" else Purpose.DRAFT
        choose_tokens(
            logits,
            draft,
            offset,
            self.seeds,
            lengths,
            transforms.temperature,
            None if transforms.all_greedy else purpose,
            part,
            bias,
            None if floors is None else floors[:, 0],
            least,
        )

    def verify(
        self, logits: Tensor, draft: Draft, lengths: Tensor, likelihoods: Likelihoods | None = None
    ) -> tuple[Verdict, Tensor]:
        """logits: (B, γ + 1, V) of the target after each of the last committed token and the draft tokens; likelihoods:
        of the same, written. Returns the verdict, and (B,) bool: rows that it means nothing for, since logits it rests
        on are not finite."""
        config, transforms = self.config, self.transforms
        if transforms.shifts:
            positions = lengths[:, None] + torch.arange(logits.shape[1], device=logits.device)  # (B, γ + 1), decided
            logits = transforms.shift(logits, positions, draft.token_ids)
        num_accepted, next_token, failed = verify_logits(
            logits,
            draft.token_ids,
            draft.lengths,
            draft.logits,
            self.seeds,
            lengths,
            transforms.temperature,
            "greedy" if transforms.all_greedy else config.variant,
            None if transforms.all_greedy else transforms.floors(logits),
            config.typical_epsilon,
            config.typical_delta,
            likelihoods,
        )
        return Verdict(num_accepted, next_token), failed


def _describe(value: Any) -> Hashable:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def make_sampler(
    config: SamplingConfig,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    vocab_size: int,
    seed: int,
    device: torch.device,
) -> Sampler:
    """A sampler for rows that share one configuration. ValueError for a bias or a stop id outside the vocabulary.

    A row's noise depends on the seed and on how often its prompt stands in rows before it, not on its place: the same
    prompt twice gives two texts, and neighbours change nothing."""
    for token_id in (*config.logit_bias, *stop_ids):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"logit_bias or stop_token_ids name token {token_id}; ids run from 0 to {vocab_size - 1}")
    rows = len(prompts)

    def column(value: float, used: bool) -> Tensor | None:
        return torch.full((rows,), value, dtype=torch.float32, device=device) if used else None

    top_k = min(config.top_k, vocab_size)
    penalised = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (
        1.0,
        0.0,
        0.0,
    )
    delayed = config.min_tokens > 0 and len(stop_ids) > 0
    transforms = Transforms(
        temperature=torch.full((rows,), config.temperature, dtype=torch.float32, device=device),
        all_greedy=config.temperature == 0,
        top_k=torch.full((rows,), top_k, device=device) if top_k > 0 else None,
        max_top_k=min(1 << (top_k - 1).bit_length(), vocab_size) if top_k > 0 else 0,  # few values: few graphs
        top_p=column(config.top_p, config.top_p < 1),
        min_p=column(config.min_p, config.min_p > 0),
        bias=_bias(config, rows, vocab_size, device),
        repetition=column(config.repetition_penalty, penalised),
        presence=column(config.presence_penalty, penalised),
        frequency=column(config.frequency_penalty, penalised),
        prompt_seen=_seen(prompts, vocab_size, device) if penalised else None,
        output_counts=torch.zeros(rows, vocab_size, device=device) if penalised else None,
        stop_ids=torch.tensor([list(stop_ids)] * rows, device=device) if delayed else None,
        min_lengths=torch.tensor([len(p) + config.min_tokens for p in prompts], device=device) if delayed else None,
    )
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for prompt in map(tuple, prompts):
        streams.append((seed + seen[prompt] * STREAM_STRIDE) % 2**63)
        seen[prompt] += 1
    seeds = torch.tensor(streams, dtype=torch.int64, device=device)
    return Sampler(config, transforms, seeds)


def _bias(config: SamplingConfig, rows: int, vocab_size: int, device: torch.device) -> Tensor | None:
    if not config.logit_bias:
        return None
    bias = torch.zeros(rows, vocab_size, device=device)
    for token_id, value in config.logit_bias.items():
        bias[:, token_id] = value
    return bias


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True
    return seen
