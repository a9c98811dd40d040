"""Triton: the accepted prefix of every row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_kernel(token_ids_ptr, first_rejection_ptr, kept_ptr, gamma, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)  # [BLOCK]
    accepted = position < tl.load(first_rejection_ptr + row)
    token = tl.load(token_ids_ptr + row * gamma + position, mask=accepted & (position < gamma), other=-1)
    tl.store(kept_ptr + row * gamma + position, token, mask=position < gamma)


def gather_accepted(token_ids: Tensor, first_rejection: Tensor) -> Tensor:
    batch_size, gamma = token_ids.shape
    kept = torch.empty(batch_size, gamma, dtype=torch.int64, device=token_ids.device)
    if kept.numel():
        with torch.cuda.device_of(kept):
            _gather_kernel[(batch_size,)](
                token_ids.contiguous(),
                first_rejection.contiguous(),
                kept,
                gamma,
                BLOCK=triton.next_power_of_2(gamma),
                num_warps=1,
            )
    return kept
