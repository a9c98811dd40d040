"""Exact verification by rejection sampling: Leviathan, Kalman and Matias 2023, Algorithm 1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashspec.core import Draft, Verdict
from flashspec.kernels import gather_accepted, verify_logits


class Sample(NamedTuple):
    """token_ids: (B, γ + 1) int64, the accepted draft tokens, then one more, padded with -1. num_accepted: (B,)."""

    token_ids: Tensor
    num_accepted: Tensor


def rejection_sample(
    input_ids: Tensor, draft_logprobs: Tensor, target_logprobs: Tensor, draft_token_ids: Tensor, gamma: int
) -> Sample:
    """One exact accept / reject round outside the engine, with torch's global generator.

    input_ids: (B, T) int64, the text so far. draft_logprobs: (B, γ, V). target_logprobs: (B, γ + 1, V), the last row
    deciding the bonus token. draft_token_ids: (B, γ) int64. ValueError where shapes do not fit.
    """
    check_shapes(input_ids, draft_logprobs, target_logprobs, draft_token_ids, gamma)
    draft = full_draft(draft_token_ids, draft_logprobs)
    seeds, lengths = fresh_noise(input_ids)
    heat = torch.ones(input_ids.shape[0], device=input_ids.device)
    num_accepted, next_token, _ = verify_logits(
        target_logprobs.float(), draft_token_ids, draft.lengths, draft.logits, seeds, lengths, heat, "rejection"
    )
    return emit(draft_token_ids, Verdict(num_accepted, next_token))


def check_shapes(
    input_ids: Tensor, draft_logprobs: Tensor, target_logprobs: Tensor, draft_token_ids: Tensor, gamma: int
) -> None:
    batch_size, vocab_size = input_ids.shape[0], target_logprobs.shape[-1]
    expected = {
        "draft_logprobs": (draft_logprobs, (batch_size, gamma, vocab_size)),
        "target_logprobs": (target_logprobs, (batch_size, gamma + 1, vocab_size)),
        "draft_token_ids": (draft_token_ids, (batch_size, gamma)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {shape}")


def emit(draft_token_ids: Tensor, verdict: Verdict) -> Sample:
    """The accepted tokens and the one after them, in one padded tensor."""
    kept = gather_accepted(draft_token_ids, verdict.num_accepted.int())
    token_ids = torch.cat([kept, torch.full_like(kept[:, :1], -1)], 1)
    token_ids.scatter_(1, verdict.num_accepted[:, None], verdict.next_token[:, None])
    return Sample(token_ids, verdict.num_accepted)


def full_draft(token_ids: Tensor, logprobs: Tensor) -> Draft:
    lengths = torch.full((token_ids.shape[0],), token_ids.shape[1], device=token_ids.device)
    return Draft(token_ids, lengths, logprobs.float())


def fresh_noise(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds and text lengths, (B,) int64."""
    seeds = torch.randint(2**62, (input_ids.shape[0],), device=input_ids.device)
    return seeds, torch.full_like(seeds, input_ids.shape[1])
