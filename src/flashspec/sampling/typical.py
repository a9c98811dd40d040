"""Typical acceptance (Cai et al. 2024, Medusa). Lossy: it keeps draft tokens that the target finds likely enough."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.core import Verdict
from flashspec.kernels import verify_logits
from flashspec.sampling.rejection import Sample, check_shapes, emit, fresh_noise, full_draft


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
    heat = torch.ones(input_ids.shape[0], device=input_ids.device)
    rows = (draft_token_ids, draft.lengths, None, seeds, lengths, heat)
    num_accepted, next_token, _ = verify_logits(target_logprobs.float(), *rows, "typical", epsilon=epsilon, delta=delta)
    return emit(draft_token_ids, Verdict(num_accepted, next_token))
