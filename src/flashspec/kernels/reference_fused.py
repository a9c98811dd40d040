"""PyTorch twin of the fused verification; `flashspec.kernels.verify_logits` holds the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.kernels.reference import philox_gumbel, philox_uniform, verify_tokens

ACCEPT, RECOVER, TOKEN = 1, 2, 3  # what a draw is for: sampling.noise.Purpose
COLDEST = 1e-6


def verify_logits(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_lengths: Tensor,
    draft_weights: Tensor | None,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = target_logits.float()
    gamma, vocab_size = draft_token_ids.shape[1], logits.shape[2]
    offsets = torch.arange(gamma + 1, device=logits.device)
    positions = lengths[:, None] + offsets  # (B, γ + 1)
    finite = logits.amax(-1).isfinite()  # (B, γ + 1)
    greedy = (temperature == 0)[:, None] | (variant == "greedy")  # (B, 1)
    weights = logits / temperature.clamp(min=COLDEST)[:, None, None]
    best = logits.argmax(-1)  # (B, γ + 1)
    if variant == "coupled":
        noise = philox_gumbel(seeds, positions, TOKEN, vocab_size)
        best = torch.where(greedy, best, (weights + noise).argmax(-1))
    passed = best[:, :gamma] == draft_token_ids
    if variant == "rejection":
        uniform = philox_uniform(seeds, positions[:, :gamma], ACCEPT)
        passed = torch.where(greedy, passed, _test(weights, draft_token_ids, draft_weights, uniform))
    passed = passed & finite[:, :gamma] & (offsets[:gamma] < draft_lengths[:, None])
    num_accepted = passed.long().cumprod(1).sum(1)
    chosen = num_accepted[:, None]  # (B, 1)
    next_token = best.gather(1, chosen)[:, 0]
    if variant == "rejection":
        noise = philox_gumbel(seeds, positions.gather(1, chosen), RECOVER, vocab_size)[:, 0]
        residual = _residual(weights, draft_token_ids, draft_lengths, draft_weights, num_accepted)
        next_token = torch.where(greedy[:, 0], next_token, (residual.log() + noise).argmax(-1))
    failed = ((offsets <= chosen) & ~finite).any(1)
    return num_accepted, next_token, failed


def _test(weights: Tensor, token_ids: Tensor, draft_weights: Tensor | None, uniform: Tensor) -> Tensor:
    target = weights[:, :-1].log_softmax(-1)
    draft = torch.zeros_like(target) if draft_weights is None else draft_weights.float().log_softmax(-1)
    return verify_tokens(draft, target, uniform, token_ids)[0]


def _residual(
    weights: Tensor, token_ids: Tensor, draft_lengths: Tensor, draft_weights: Tensor | None, num_accepted: Tensor
) -> Tensor:
    """(B, V) probabilities up to a factor: max(0, p - q) after a rejection, p where that is empty or nothing failed."""
    rows = torch.arange(weights.shape[0], device=weights.device)
    target_probs = weights[rows, num_accepted].softmax(-1)  # (B, V)
    if token_ids.shape[1] == 0:
        return target_probs
    index = num_accepted.clamp(max=token_ids.shape[1] - 1)
    if draft_weights is None:
        draft_probs = torch.arange(weights.shape[2], device=weights.device) == token_ids[rows, index][:, None]
    else:
        draft_probs = draft_weights[rows, index].float().softmax(-1)
    excess = torch.where(target_probs > draft_probs, target_probs - draft_probs.float(), 0.0)  # NaN drafts: p
    keeps = (num_accepted >= draft_lengths)[:, None] | (excess.sum(-1, keepdim=True) == 0)
    return torch.where(keeps, target_probs, excess)
