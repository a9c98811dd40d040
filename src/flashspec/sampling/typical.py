"""Typical acceptance (Cai et al. 2024, Medusa). Lossy: it keeps draft tokens that the target finds likely enough."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.core import Draft, Verdict
from flashspec.kernels import philox_gumbel
from flashspec.sampling.noise import Purpose
from flashspec.sampling.rejection import Sample, check_shapes, emit, fresh_noise, full_draft


def verify_typical(
    weights: Tensor, draft: Draft, seeds: Tensor, lengths: Tensor, epsilon: float, delta: float
) -> Verdict:
    """weights: (B, γ + 1, V) log-weights of the target after texts of lengths (B,).

    Keep a draft token x while p(x) > min(epsilon, delta * exp(-entropy(p))); the next token is drawn from p."""
    logprobs = weights.log_softmax(-1)  # (B, γ + 1, V)
    probs = logprobs.exp()
    entropy = -torch.where(probs > 0, probs * logprobs, 0.0).sum(-1)[:, :-1]  # (B, γ)
    threshold = torch.clamp(delta * torch.exp(-entropy), max=epsilon)
    accepted = probs[:, :-1].gather(-1, draft.token_ids[..., None])[..., 0] > threshold
    accepted &= torch.arange(accepted.shape[1], device=accepted.device) < draft.lengths[:, None]
    num_accepted = accepted.long().cumprod(1).sum(1)
    position = (lengths + num_accepted)[:, None]
    noise = philox_gumbel(seeds, position, Purpose.RECOVER, weights.shape[-1])[:, 0]
    chosen = logprobs[torch.arange(len(logprobs), device=logprobs.device), num_accepted]  # (B, V)
    next_token = (chosen + noise).argmax(-1)
    return Verdict(num_accepted, next_token)


def typical_sample(
    input_ids: Tensor,
    draft_logprobs: Tensor,
    target_logprobs: Tensor,
    draft_token_ids: Tensor,
    gamma: int,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Sample:
    """One round outside the engine; arguments and result as in `rejection_sample`."""
    check_shapes(input_ids, draft_logprobs, target_logprobs, draft_token_ids, gamma)
    draft = full_draft(draft_token_ids, draft_logprobs)
    seeds, lengths = fresh_noise(input_ids)
    verdict = verify_typical(target_logprobs.float(), draft, seeds, lengths, epsilon, delta)
    return emit(draft_token_ids, verdict)
