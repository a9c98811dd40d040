"""Window and commit on a CPU; `flashspec.kernels` checks the arguments and holds the contracts."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flashspec.kernels.native_build import library
from flashspec.kernels.reference_fused import HEAD

_STEP = ("token_ids", "draft_lengths", "num_accepted", "next_token", "failed", "faulty")
_STATE = ("tokens", "lengths", "limits", "finish", "stop_ids", "cached", "packed")
_SIZES = ("batch", "gamma", "tokens_stride", "num_stops", "num_readers")


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _STEP + _STATE),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


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
    packed = torch.empty(batch_size, HEAD + gamma + 1, dtype=torch.int64)
    read = (token_ids, draft_lengths, num_accepted, next_token, failed, faulty, limits, stop_ids)
    ids, drafted, accepted, following, broken, faults, ends, stops = (
        None if tensor is None else tensor.contiguous() for tensor in read
    )
    alive = (ids, drafted, accepted, following, broken, faults, tokens, lengths, ends, finish, stops, cached, packed)
    step = _Step(
        *(None if tensor is None else tensor.data_ptr() for tensor in alive),
        batch_size,
        gamma,
        tokens.stride(0),
        stop_ids.shape[1],
        cached.shape[0],
    )
    library().flashspec_commit(ctypes.byref(step))
    return packed


def window(
    tokens: Tensor, lengths: Tensor, draft_token_ids: Tensor, capacity: int, cached: Tensor
) -> tuple[Tensor, Tensor]:
    batch_size, gamma = draft_token_ids.shape
    draft_token_ids, lengths = draft_token_ids.contiguous(), lengths.contiguous()
    token_ids = torch.empty(batch_size, gamma + 1, dtype=torch.int64)
    positions = torch.empty_like(token_ids)
    library().flashspec_window(
        tokens.data_ptr(),
        lengths.data_ptr(),
        draft_token_ids.data_ptr(),
        batch_size,
        gamma,
        tokens.stride(0),
        capacity,
        token_ids.data_ptr(),
        positions.data_ptr(),
        cached.data_ptr(),
    )
    return token_ids, positions
