"""Triton: a verdict into the text. One program a row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashspec.core import FinishReason
from flashspec.kernels.reference_fused import HEAD

RUNNING, STOP = tl.constexpr(FinishReason.RUNNING.value), tl.constexpr(FinishReason.STOP.value)
LENGTH, ERROR = tl.constexpr(FinishReason.LENGTH.value), tl.constexpr(FinishReason.ERROR.value)
COLUMNS = tl.constexpr(HEAD)


@triton.jit(do_not_specialize=["gamma", "n_stops", "n_readers"])
def _commit_kernel(
    draft,
    verdict,
    state,
    stop_ids_ptr,
    cached_ptr,
    packed_ptr,
    tokens_stride,
    size,
    gamma,
    n_stops,
    n_readers,
    POSITIONS: tl.constexpr,
    STOPS: tl.constexpr,
    READERS: tl.constexpr,
):
    row = tl.program_id(0)
    token_ids_ptr, draft_lengths_ptr, faulty_ptr = draft
    num_accepted_ptr, next_token_ptr, failed_ptr = verdict
    tokens_ptr, lengths_ptr, limits_ptr, finish_ptr = state
    num_accepted, next_token = tl.load(num_accepted_ptr + row), tl.load(next_token_ptr + row)
    length, limit, finish = tl.load(lengths_ptr + row), tl.load(limits_ptr + row), tl.load(finish_ptr + row)
    drafted, failed = tl.load(draft_lengths_ptr + row), tl.load(failed_ptr + row) != 0
    position, stop = tl.arange(0, POSITIONS), tl.arange(0, STOPS)  # [POSITIONS], [STOPS]
    token = tl.load(token_ids_ptr + row * gamma + position, mask=position < gamma, other=-1)
    token = tl.where(position == num_accepted, next_token, tl.where(position == gamma, next_token, token))
    stop_ids = tl.load(stop_ids_ptr + row * n_stops + stop, mask=stop < n_stops, other=-1)

    running = finish == RUNNING
    num_emitted = tl.minimum(num_accepted + tl.where(failed, 0, 1), limit - length)
    hits = tl.max(((token[:, None] == stop_ids[None, :]) & (token[:, None] >= 0)).to(tl.int32), 1) != 0
    stops = hits & (position < num_emitted)
    before_stop = tl.min(tl.where(stops, position, POSITIONS), 0)  # tokens ahead of the first stop token
    num_emitted = tl.where(running, tl.minimum(num_emitted, before_stop + 1), 0)
    length += num_emitted
    ended = tl.where(length >= limit, LENGTH, tl.where(failed, ERROR, RUNNING))
    finish = tl.where(running, tl.where(before_stop < POSITIONS, STOP, ended), finish)
    drafted = tl.where(finish != RUNNING, tl.minimum(drafted, num_emitted), drafted)
    faulty = (row * 0).to(tl.int64)
    if faulty_ptr is not None:
        faulty = ((tl.load(faulty_ptr + row) != 0) & running).to(tl.int64)

    place = length - num_emitted + position
    written = (position <= gamma) & (place < size)
    tl.store(tokens_ptr + row.to(tl.int64) * tokens_stride + place, token, mask=written)
    tl.store(lengths_ptr + row, length)
    tl.store(finish_ptr + row, finish.to(tl.int64))
    reader = tl.arange(0, READERS)  # [READERS]
    entry = cached_ptr + reader * tl.num_programs(0) + row
    cached = tl.load(entry, mask=reader < n_readers, other=0)
    tl.store(entry, tl.minimum(cached, length - 1), mask=reader < n_readers)
    packed_ptr += row * (COLUMNS + gamma + 1)
    tl.store(packed_ptr, drafted)
    tl.store(packed_ptr + 1, tl.minimum(num_accepted, num_emitted))
    tl.store(packed_ptr + 2, num_emitted)
    tl.store(packed_ptr + 3, finish.to(tl.int64))
    tl.store(packed_ptr + 4, faulty)
    tl.store(packed_ptr + COLUMNS + position, token, mask=position <= gamma)


def commit(
    token_ids: Tensor,
    draft_lengths: Tensor,
    num_accepted: Tensor,
    next_token: Tensor,
    failed: Tensor,
    faulty: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finish: Tensor,
    stop_ids: Tensor,
    cached: Tensor,
) -> Tensor:
    batch_size, gamma = token_ids.shape
    packed = torch.empty(batch_size, HEAD + gamma + 1, dtype=torch.int64, device=token_ids.device)
    if batch_size:
        with torch.cuda.device_of(token_ids):
            _commit_kernel[(batch_size,)](
                (token_ids.contiguous(), draft_lengths.contiguous(), None if faulty is None else faulty.contiguous()),
                (num_accepted.contiguous(), next_token.contiguous(), failed.contiguous()),
                (tokens, lengths, limits.contiguous(), finish),
                stop_ids.contiguous(),
                cached,
                packed,
                tokens.stride(0),
                tokens.shape[1],
                gamma,
                stop_ids.shape[1],
                cached.shape[0],
                POSITIONS=triton.next_power_of_2(gamma + 1),
                STOPS=triton.next_power_of_2(max(stop_ids.shape[1], 1)),
                READERS=triton.next_power_of_2(max(cached.shape[0], 1)),
                num_warps=1,
            )
    return packed
