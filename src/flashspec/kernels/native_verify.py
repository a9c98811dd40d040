"""Noise and verification on a CPU; `flashspec.kernels` checks the arguments and holds the contracts."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flashspec.kernels.native_build import library

VARIANTS = ("rejection", "coupled", "greedy")  # in the order of the source's
_POINTERS = ("target", "token_ids", "draft_lengths", "draft", "seeds", "lengths", "temperature", "floors")


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("gamma", "vocab_size", "variant")),
        *((name, ctypes.c_void_p) for name in ("num_accepted", "next_token", "failed")),
    )


def verify_logits(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_lengths: Tensor,
    draft_weights: Tensor | None,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    variant: str,
    floors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, positions, vocab_size = target_logits.shape
    num_accepted = torch.empty(batch_size, dtype=torch.int64)
    next_token, failed = torch.empty_like(num_accepted), torch.zeros(batch_size, dtype=torch.bool)
    inputs = (
        target_logits.float(),
        draft_token_ids,
        draft_lengths,
        None if draft_weights is None else draft_weights.float(),
        seeds,
        lengths,
        temperature,
        floors,
    )
    alive = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    rows = _Rows(
        *(None if tensor is None else tensor.data_ptr() for tensor in alive),
        positions - 1,
        vocab_size,
        VARIANTS.index(variant),
        *(result.data_ptr() for result in (num_accepted, next_token, failed)),
    )
    library().flashspec_verify(ctypes.byref(rows), batch_size)
    return num_accepted, next_token, failed


def philox_gumbel(seeds: Tensor, positions: Tensor, purpose: int, vocab_size: int) -> Tensor:
    batch_size, queries = positions.shape
    noise = torch.empty(batch_size, queries, vocab_size)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    library().flashspec_gumbel(
        seeds.data_ptr(), positions.data_ptr(), batch_size, queries, purpose, vocab_size, noise.data_ptr()
    )
    return noise
