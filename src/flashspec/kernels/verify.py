"""Triton: which draft tokens pass the acceptance test. One program a row, two scalars a position."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _verify_kernel(
    draft_ptr,
    target_ptr,
    u_ptr,
    token_ids_ptr,
    accepted_ptr,
    first_rejection_ptr,
    gamma,
    vocab_size,
    draft_stride_row,
    draft_stride_position,
    draft_stride_token,
    target_stride_row,
    target_stride_position,
    target_stride_token,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)  # [BLOCK]
    in_draft = position < gamma
    token = tl.load(token_ids_ptr + row * gamma + position, mask=in_draft, other=-1)
    readable = (token >= 0) & (token < vocab_size)

    draft_offset = row * draft_stride_row + position * draft_stride_position + token * draft_stride_token
    target_offset = row * target_stride_row + position * target_stride_position + token * target_stride_token
    draft = tl.load(draft_ptr + draft_offset, mask=readable, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + target_offset, mask=readable, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * gamma + position, mask=in_draft, other=1.0)

    log_u = tl.log(u.to(tl.float64)).to(tl.float32)  # rounded from float64, as in the twin
    passed = readable & (log_u < 0) & (log_u < target - draft)
    first_rejection = tl.min(tl.where(in_draft & (passed == 0), position, gamma))
    tl.store(accepted_ptr + row * gamma + position, passed, mask=in_draft)
    tl.store(first_rejection_ptr + row, first_rejection)


def verify_tokens(
    draft_logprobs: Tensor, target_logprobs: Tensor, u: Tensor, draft_token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    batch_size, gamma, vocab_size = draft_logprobs.shape
    accepted = torch.empty(batch_size, gamma, dtype=torch.bool, device=u.device)
    first_rejection = torch.empty(batch_size, dtype=torch.int32, device=u.device)
    if batch_size:
        with torch.cuda.device_of(u):
            _verify_kernel[(batch_size,)](
                draft_logprobs,
                target_logprobs,
                u.contiguous(),
                draft_token_ids.contiguous(),
                accepted,
                first_rejection,
                gamma,
                vocab_size,
                *draft_logprobs.stride(),
                *target_logprobs.stride(),
                BLOCK=triton.next_power_of_2(max(gamma, 1)),
                num_warps=1,
            )
    return accepted, first_rejection
