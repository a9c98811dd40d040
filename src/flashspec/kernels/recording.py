"""Triton: hidden states into the buffer from which drafter heads read them, and out of it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels.device import overlapped


@triton.jit
def _record_kernel(
    states, positions_ptr, buffer_ptr, n_queries, stride_row, width, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, PARTS)."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.arange(0, WIDTH)
    mask = column < width
    slot = tl.load(positions_ptr + token)
    to_ptr = buffer_ptr + token // n_queries * stride_row + (slot * PARTS + part) * width
    for index in tl.static_range(PARTS):
        if part == index:
            tl.store(to_ptr + column, tl.load(states[index] + token * width + column, mask=mask), mask=mask)


@triton.jit
def _recall_kernel(
    tokens_ptr,
    lengths_ptr,
    cached_ptr,
    buffer_ptr,
    parts,
    start_ptr,
    token_ids_ptr,
    slots_ptr,
    states_ptr,
    following_ptr,
    stride_tokens,
    stride_row,
    stride_slot,
    last_slot,
    width,
    size,
    ahead,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (B * size, PARTS)."""
    token, nth = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, place = token // size, token % size
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths_ptr + row)
    start = length - 1 - size if start_ptr is None else tl.load(start_ptr + row)
    slot = tl.maximum(tl.minimum(tl.minimum(start + place, length - 2), last_slot), 0)
    part = 0
    for index in tl.static_range(PARTS):
        part = tl.where(nth == index, parts[index], part)
    column = tl.arange(0, WIDTH)
    mask = column < width
    from_ptr = buffer_ptr + row * stride_row + slot * stride_slot + part * width
    to_ptr = states_ptr + (token * PARTS + nth) * width
    tl.store(to_ptr + column, tl.load(from_ptr + column, mask=mask), mask=mask)
    if nth == 0:
        tl.store(slots_ptr + token, slot)
        tl.store(token_ids_ptr + token, tl.load(tokens_ptr + row * stride_tokens + slot + 1))
        if place == size - 1:
            tl.store(cached_ptr + row, tl.minimum(slot + 1, length - 1))
            behind = tl.arange(0, AHEAD)
            at = behind * (tl.num_programs(0) // size) + row
            tl.store(following_ptr + at, tl.minimum(length - 1 + behind, last_slot), mask=behind < ahead)


def record(states: Sequence[Tensor], positions: Tensor, buffer: Tensor) -> None:
    width = buffer.shape[3]
    with torch.cuda.device_of(buffer):
        _record_kernel[(positions.numel(), len(states))](
            tuple(states),
            positions,
            buffer,
            positions.shape[1],
            buffer.stride(0),
            width,
            PARTS=len(states),
            WIDTH=triton.next_power_of_2(width),
            num_warps=8,
            **overlapped(buffer.device),
        )


def recall(
    tokens: Tensor,
    lengths: Tensor,
    cached: Tensor,
    buffer: Tensor,
    parts: tuple[int, ...],
    start: Tensor | None,
    size: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, capacity, _, width = buffer.shape
    token_ids, slots = (torch.empty(rows, size, dtype=torch.int64, device=buffer.device) for _ in range(2))
    following = torch.empty(ahead, rows, dtype=torch.int64, device=buffer.device)
    states = torch.empty(rows, size, len(parts) * width, dtype=buffer.dtype, device=buffer.device)
    with torch.cuda.device_of(buffer):
        _recall_kernel[(rows * size, len(parts))](
            tokens,
            lengths,
            cached,
            buffer,
            parts,
            start,
            token_ids,
            slots,
            states,
            following,
            tokens.stride(0),
            buffer.stride(0),
            buffer.stride(1),
            capacity - 1,
            width,
            size,
            ahead,
            PARTS=len(parts),
            WIDTH=triton.next_power_of_2(width),
            AHEAD=triton.next_power_of_2(max(ahead, 1)),
            num_warps=8,
            **overlapped(buffer.device),
        )
    return token_ids, slots, states, following.T
