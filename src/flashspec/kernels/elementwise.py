"""Triton: what a decoder does between its matrix products, a token a program."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels.device import overlapped


@triton.jit
def _store_waves(positions_ptr, frequencies_ptr, waves_ptr, token, half, wave_scale, dtype, HALF: tl.constexpr):
    """A token's cos and sin, rounded as its weights are."""
    wave = tl.arange(0, HALF)
    in_half = wave < half
    angle = tl.load(positions_ptr + token).to(tl.float32) * tl.load(frequencies_ptr + wave, mask=in_half, other=0.0)
    cos, sin = tl.cos(angle) * wave_scale, tl.sin(angle) * wave_scale
    tl.store(waves_ptr + token * 2 * half + wave, cos.to(dtype).to(tl.float32), mask=in_half)
    tl.store(waves_ptr + token * 2 * half + half + wave, sin.to(dtype).to(tl.float32), mask=in_half)


@triton.jit
def _embed_kernel(
    token_ids_ptr,
    positions_ptr,
    embedding_ptr,
    norm_ptr,
    frequencies_ptr,
    hidden_ptr,
    weighted_ptr,
    squares_ptr,
    waves_ptr,
    vocab_size,
    K,
    half,
    n_squares,
    wave_scale,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    SQUARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0)
    dtype = hidden_ptr.dtype.element_ty
    column = tl.arange(0, WIDTH)
    mask = column < K
    norm = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    # Behind a row's text stands garbage; whatever it is, no other memory is read.
    id_ = tl.minimum(tl.maximum(tl.load(token_ids_ptr + token), 0), vocab_size - 1)
    hidden = tl.load(embedding_ptr + id_ * K + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + token * K + column, hidden.to(dtype), mask=mask)
    tl.store(weighted_ptr + token * K + column, (hidden * norm).to(dtype), mask=mask)
    part = tl.arange(0, SQUARES)
    total = tl.sum(hidden * hidden)
    tl.store(squares_ptr + token * n_squares + part, tl.where(part == 0, total, 0.0), mask=part < n_squares)
    _store_waves(positions_ptr, frequencies_ptr, waves_ptr, token, half, wave_scale, dtype, HALF)


@triton.jit
def _join_kernel(
    token_ids_ptr,
    positions_ptr,
    embedding_ptr,
    embedding_norm_ptr,
    hidden_ptr,
    hidden_norm_ptr,
    frequencies_ptr,
    both_ptr,
    waves_ptr,
    vocab_size,
    n_queries,
    stride_ids,
    K,
    half,
    wave_scale,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0)
    dtype = both_ptr.dtype.element_ty
    column = tl.arange(0, WIDTH)
    mask = column < K
    embedding_norm = tl.load(embedding_norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    hidden_norm = tl.load(hidden_norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    id_ = tl.load(token_ids_ptr + token // n_queries * stride_ids + token % n_queries)
    id_ = tl.minimum(tl.maximum(id_, 0), vocab_size - 1)  # as in _embed_kernel
    hidden = tl.load(hidden_ptr + token * K + column, mask=mask, other=0.0).to(tl.float32)
    embedded = tl.load(embedding_ptr + id_ * K + column, mask=mask, other=0.0).to(tl.float32)
    embedded *= tl.rsqrt(tl.sum(embedded * embedded) / K + eps) * embedding_norm
    hidden *= tl.rsqrt(tl.sum(hidden * hidden) / K + eps) * hidden_norm
    tl.store(both_ptr + token * 2 * K + column, embedded.to(dtype), mask=mask)
    tl.store(both_ptr + token * 2 * K + K + column, hidden.to(dtype), mask=mask)
    _store_waves(positions_ptr, frequencies_ptr, waves_ptr, token, half, wave_scale, dtype, HALF)


@triton.jit
def _add_norm_kernel(
    hidden_ptr, delta_ptr, norm_ptr, out_ptr, normed_ptr, K, eps, WIDTH: tl.constexpr, ADDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.arange(0, WIDTH)
    mask = column < K
    at = token.to(tl.int64) * K + column
    hidden = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        hidden += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), mask=mask)
        hidden = hidden.to(out_ptr.dtype.element_ty).to(tl.float32)
    norm = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden) / K + eps)
    tl.store(normed_ptr + at, (hidden * scale * norm).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(gate_up_ptr, out_ptr, I, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # noqa: E741
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    gate = tl.load(gate_up_ptr + token * 2 * I + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * I + I + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * I + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _round_kernel(x_ptr, columns_ptr, bytes_ptr, scales_ptr, K, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.arange(0, WIDTH)
    mask = column < K
    x = tl.load(x_ptr + token * K + column, mask=mask, other=0.0).to(tl.float32)
    x *= tl.load(columns_ptr + column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x)), 1e-30)
    steps = tl.floor(x * (32512 / largest) + 0.5).to(tl.int32)
    high = (steps + 128) >> 8
    tl.store(bytes_ptr + token * 2 * K + column, high.to(tl.int8), mask=mask)
    tl.store(bytes_ptr + token * 2 * K + K + column, (steps - high * 256).to(tl.int8), mask=mask)
    faults = tl.sum(x * 0.0)  # 0, or NaN
    tl.store(scales_ptr + token, largest / 32512 + faults)


def round_to_bytes(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = x.shape
    found = torch.empty(tokens, 2, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _round_kernel[(tokens,)](
            x, columns, found, scales, width, WIDTH=triton.next_power_of_2(width), num_warps=16, **overlapped(x.device)
        )
    return found, scales


def embed(
    token_ids: Tensor,
    positions: Tensor,
    embedding: Tensor,
    norm: Tensor,
    frequencies: Tensor,
    wave_scale: float,
    n_squares: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width, half = token_ids.numel(), embedding.shape[1], len(frequencies)
    hidden = torch.empty(tokens, width, dtype=embedding.dtype, device=embedding.device)
    weighted = torch.empty_like(hidden)
    squares = torch.empty(tokens, n_squares, dtype=torch.float32, device=embedding.device)
    waves = torch.empty(tokens, 2, half, dtype=torch.float32, device=embedding.device)
    with torch.cuda.device_of(embedding):
        _embed_kernel[(tokens,)](
            token_ids,
            positions,
            embedding,
            norm,
            frequencies,
            hidden,
            weighted,
            squares,
            waves,
            len(embedding),
            width,
            half,
            n_squares,
            wave_scale,
            WIDTH=triton.next_power_of_2(width),
            HALF=triton.next_power_of_2(half),
            SQUARES=triton.next_power_of_2(n_squares),
            num_warps=8,
            **overlapped(embedding.device),
        )
    return hidden, weighted, squares, waves


def join(
    token_ids: Tensor,
    positions: Tensor,
    embedding: Tensor,
    embedding_norm: Tensor,
    hidden: Tensor,
    hidden_norm: Tensor,
    frequencies: Tensor,
    wave_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tokens, width, half = token_ids.numel(), embedding.shape[1], len(frequencies)
    both = torch.empty(tokens, 2 * width, dtype=embedding.dtype, device=embedding.device)
    waves = torch.empty(tokens, 2, half, dtype=torch.float32, device=embedding.device)
    with torch.cuda.device_of(embedding):
        _join_kernel[(tokens,)](
            token_ids,
            positions,
            embedding,
            embedding_norm,
            hidden,
            hidden_norm,
            frequencies,
            both,
            waves,
            len(embedding),
            token_ids.shape[1],
            token_ids.stride(0),
            width,
            half,
            wave_scale,
            eps,
            WIDTH=triton.next_power_of_2(width),
            HALF=triton.next_power_of_2(half),
            num_warps=8,
            **overlapped(embedding.device),
        )
    return both, waves


def normalise(hidden: Tensor, norm: Tensor, eps: float) -> Tensor:
    normed = torch.empty_like(hidden)
    _add_norm(hidden, None, norm, eps, None, normed)
    return normed


def add_norm(hidden: Tensor, delta: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    _add_norm(hidden, delta, norm, eps, out, normed)
    return out, normed


def _add_norm(
    hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float, out: Tensor | None, normed: Tensor
) -> None:
    width = hidden.shape[1]
    with torch.cuda.device_of(hidden):
        _add_norm_kernel[(len(hidden),)](
            hidden,
            delta,
            norm,
            out,
            normed,
            width,
            eps,
            WIDTH=triton.next_power_of_2(width),
            ADDS=delta is not None,
            num_warps=8,
            **overlapped(hidden.device),
        )


def gate(gate_up: Tensor) -> Tensor:
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _gate_kernel[(tokens, triton.cdiv(width, 2048))](
            gate_up, out, width, BLOCK=2048, num_warps=4, **overlapped(gate_up.device)
        )
    return out
