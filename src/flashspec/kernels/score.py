"""Triton: what a target reads in a step. One program a row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["gamma", "last_slot"])
def _window_kernel(
    tokens_ptr,
    lengths_ptr,
    draft_ptr,
    window_ptr,
    positions_ptr,
    cached_ptr,
    tokens_stride,
    draft_stride,
    gamma,
    last_slot,
    POSITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, POSITIONS)  # [POSITIONS]
    start = tl.load(lengths_ptr + row) - 1
    last = tl.load(tokens_ptr + row * tokens_stride + start)
    drafted = tl.load(draft_ptr + row * draft_stride + place - 1, mask=(place > 0) & (place <= gamma), other=0)
    at = row * (gamma + 1) + place
    tl.store(window_ptr + at, tl.where(place == 0, last, drafted), mask=place <= gamma)
    tl.store(positions_ptr + at, tl.minimum(start + place, last_slot), mask=place <= gamma)
    tl.store(cached_ptr + row, tl.minimum(start + gamma, last_slot) + 1)


def window(
    tokens: Tensor, lengths: Tensor, draft_token_ids: Tensor, capacity: int, cached: Tensor
) -> tuple[Tensor, Tensor]:
    batch_size, gamma = draft_token_ids.shape
    token_ids = torch.empty(batch_size, gamma + 1, dtype=torch.int64, device=tokens.device)
    positions = torch.empty_like(token_ids)
    if batch_size:
        with torch.cuda.device_of(tokens):
            _window_kernel[(batch_size,)](
                tokens,
                lengths,
                draft_token_ids,
                token_ids,
                positions,
                cached,
                tokens.stride(0),
                draft_token_ids.stride(0),
                gamma,
                capacity - 1,
                POSITIONS=triton.next_power_of_2(gamma + 1),
                num_warps=1,
            )
    return token_ids, positions
