"""Exact verification by rejection sampling: Leviathan, Kalman and Matias 2023, Algorithm 1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashspec.core import Draft, Verdict
from flashspec.kernels import gather_accepted, philox_gumbel, philox_uniform, verify_tokens
from flashspec.sampling.noise import Purpose


class Sample(NamedTuple):
    """token_ids: (B, γ + 1) int64, the accepted draft tokens, then one more, padded with -1. num_accepted: (B,)."""

    token_ids: Tensor
    num_accepted: Tensor


def leading(accepted: Tensor, draft_lengths: Tensor) -> Tensor:
    """(B, γ) bool to the number of leading trues (B,) int64, no more than a row's draft length."""
    within = torch.arange(accepted.shape[1], device=accepted.device) < draft_lengths[:, None]
    return (accepted & within).long().cumprod(1).sum(1)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, Q, V) at index (B,) -> (B, V)."""
    return rows[torch.arange(rows.shape[0], device=rows.device), index]


def residual_weights(target_logprobs: Tensor, draft: Draft, num_accepted: Tensor) -> Tensor:
    """Log-weights (B, V) of the next token: max(0, p - q) after a rejection, p after a fully accepted draft."""
    target_probs = pick(target_logprobs, num_accepted).exp()
    if draft.token_ids.shape[1] == 0:
        return target_probs.log()
    last = draft.token_ids.shape[1] - 1
    rejected = num_accepted < draft.lengths  # (B,)
    index = num_accepted.clamp(max=last)
    if draft.logits is None:
        draft_probs = torch.zeros_like(target_probs).scatter_(1, draft.token_ids.gather(1, index[:, None]), 1.0)
    else:
        draft_probs = pick(draft.logits, index).softmax(-1)
    residual = torch.where(rejected[:, None], target_probs - draft_probs, target_probs).clamp(min=0)
    empty = residual.sum(-1, keepdim=True) == 0  # p == q up to rounding: a rejection that exact arithmetic cannot have
    return torch.where(empty, target_probs, residual).log()


def verify_rejection(weights: Tensor, draft: Draft, seeds: Tensor, positions: Tensor) -> Verdict:
    """weights: (B, γ + 1, V) log-weights of the target, deciding text positions (B, γ + 1). seeds: (B,) int64."""
    target_logprobs = weights.log_softmax(-1)
    gamma = draft.token_ids.shape[1]
    uniform = philox_uniform(seeds, positions[:, :gamma], Purpose.ACCEPT)  # (B, γ)
    if draft.logits is None:
        chosen = target_logprobs[:, :gamma].gather(-1, draft.token_ids[..., None])[..., 0]  # (B, γ)
        accepted = uniform.log() < chosen
    else:
        draft_logprobs = draft.logits.log_softmax(-1)
        accepted, _ = verify_tokens(draft_logprobs, target_logprobs[:, :gamma], uniform, draft.token_ids)
    num_accepted = leading(accepted, draft.lengths)
    noise = philox_gumbel(seeds, positions.gather(1, num_accepted[:, None]), Purpose.RECOVER, weights.shape[-1])[:, 0]
    next_token = (residual_weights(target_logprobs, draft, num_accepted) + noise).argmax(-1)
    return Verdict(num_accepted, next_token)


def rejection_sample(
    input_ids: Tensor, draft_logprobs: Tensor, target_logprobs: Tensor, draft_token_ids: Tensor, gamma: int
) -> Sample:
    """One exact accept / reject round outside the engine, with torch's global generator.

    input_ids: (B, T) int64, the text so far. draft_logprobs: (B, γ, V). target_logprobs: (B, γ + 1, V), the last row
    deciding the bonus token. draft_token_ids: (B, γ) int64. ValueError where shapes do not fit.
    """
    check_shapes(input_ids, draft_logprobs, target_logprobs, draft_token_ids, gamma)
    draft = full_draft(draft_token_ids, draft_logprobs)
    seeds, positions = fresh_noise(input_ids, gamma)
    verdict = verify_rejection(target_logprobs.float(), draft, seeds, positions)
    return emit(draft_token_ids, verdict)


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


def fresh_noise(input_ids: Tensor, gamma: int) -> tuple[Tensor, Tensor]:
    seeds = torch.randint(2**62, (input_ids.shape[0],), device=input_ids.device)
    positions = input_ids.shape[1] + torch.arange(gamma + 1, device=input_ids.device)
    return seeds, positions.expand(input_ids.shape[0], -1)
