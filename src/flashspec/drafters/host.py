"""A class that only has `generate_draft(input_ids, gamma)` as a drafter, outside the graphs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer


@runtime_checkable
class GeneratesDraft(Protocol):
    """input_ids (1, T) int64 -> ids (1, n) int64, n from 0 to γ, and log-probabilities (1, n, V) of their draw; None:
    these tokens for certain. Text is exact only if they were drawn so."""

    def generate_draft(self, input_ids: Tensor, gamma: int) -> tuple[Tensor, Tensor | None]: ...


class HostDrafter(Drafter):
    on_host = True

    def __init__(self, source: GeneratesDraft, name: str) -> None:
        self.source = source
        self.name = name

    def start(self, context: DraftContext) -> Proposer:
        return HostProposer(self.source)


class HostProposer(Proposer):
    """Rows differ in length, so each is asked for on its own."""

    def __init__(self, source: GeneratesDraft) -> None:
        self.source = source

    def propose(self, context: DraftContext, length: int) -> Draft:
        device, vocab_size = context.tokens.device, context.target.model.vocab_size
        token_ids = torch.zeros(len(context.texts), length, dtype=torch.int64, device=device)
        logits = torch.zeros(len(context.texts), length, vocab_size, device=device)
        given = torch.zeros(len(context.texts), dtype=torch.int64, device=device)
        for row, text in enumerate(context.texts):
            if context.active[row]:
                ids, logprobs = self.source.generate_draft(torch.tensor([text], device=device), length)
                if logprobs is None:
                    logprobs = _certain(ids, vocab_size)
                n = ids.shape[-1]
                if n > length or ids.shape != (1, n) or logprobs.shape != (1, n, vocab_size):
                    raise ValueError(
                        f"generate_draft returned shapes {tuple(ids.shape)} and {tuple(logprobs.shape)}; they should "
                        f"be (1, n) and (1, n, {vocab_size}), n at most {length}"
                    )
                if n and (most := float(logprobs.max())) > 1e-3:
                    raise ValueError(f"generate_draft returned a log-probability of {most:.3g}, above 0")
                token_ids[row, :n], logits[row, :n], given[row] = ids[0], logprobs[0], n
        sound = logits.amax(-1).isfinite() & (token_ids >= 0) & (token_ids < vocab_size)  # (B, length)
        lengths = sound.long().cumprod(1).sum(1).minimum(given)
        return Draft(token_ids.clamp(0, vocab_size - 1), lengths, logits, lengths < given)


def _certain(token_ids: Tensor, vocab_size: int) -> Tensor:
    """(1, γ) -> (1, γ, V): no token but these, and an id outside the vocabulary is left to be found."""
    logprobs = torch.full((*token_ids.shape, vocab_size), -torch.inf, device=token_ids.device)
    return logprobs.scatter_(-1, token_ids.clamp(0, vocab_size - 1)[..., None], 0.0)
