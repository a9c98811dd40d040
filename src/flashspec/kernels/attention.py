"""Triton: attention of a few new tokens over a KV cache, split over the slots.

A program owns a split of the slots for one kv head and attends with all query heads of the group at once; memory gives
the cache once, and L2 again to further programs where queries are many. It normalises and rotates what it needs itself,
and writes the new keys and values that fall into its split. Splits start at multiples of a fixed length and are
combined in their order, so a token's result has the same bits whatever the other queries, rows and lengths are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels.linear import ask_ahead
from flashspec.kernels.tiling import overlaps

SPLIT = 128  # slots, up to a capacity of MOST_SPLITS * SPLIT
MOST_SPLITS = 32
MOST_PACKED = 16  # queries times query heads a program; further tiles find the cache in L2


@triton.jit
def _rotated(
    heads_ptr,
    waves_ptr,
    norm_ptr,
    head_at,
    wave_at,
    norm_at,
    mask,
    eps,
    DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Both halves (rows, n) of the heads at head_at, normalised and rotated."""
    HALF: tl.constexpr = DIM // 2
    first = tl.load(heads_ptr + head_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(heads_ptr + head_at + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(waves_ptr + wave_at, mask=mask, other=0.0)
    sin = tl.load(waves_ptr + wave_at + HALF, mask=mask, other=0.0)
    if HAS_NORM:
        mean = tl.sum(first * first + second * second, 1) / DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        first *= scale * tl.load(norm_ptr + norm_at, mask=mask, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm_ptr + norm_at + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = heads_ptr.dtype.element_ty
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _cached(keys_ptr, values_ptr, slots, used, DIM: tl.constexpr, HALF_PAD: tl.constexpr, DIM_PAD: tl.constexpr):
    """Both halves of the keys, and the values, in the cache: (LANES, CHUNK, n)."""
    half, dim = tl.arange(0, HALF_PAD)[None, None, :], tl.arange(0, DIM_PAD)[None, None, :]
    slots, used = slots[:, :, None], used[:, :, None]
    first = tl.load(keys_ptr + slots * DIM + half, mask=used & (half < DIM // 2), other=0.0)
    second = tl.load(keys_ptr + slots * DIM + half + DIM // 2, mask=used & (half < DIM // 2), other=0.0)
    return first, second, tl.load(values_ptr + slots * DIM + dim, mask=used & (dim < DIM), other=0.0)


@triton.jit
def _write(
    qkv_ptr,
    waves_ptr,
    norm_ptr,
    keys_ptr,
    values_ptr,
    positions,
    token,
    here,
    head,
    n_kv,
    width,
    eps,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Put the new keys, rotated, and values of the tokens `here` into the cache at their positions, all (QUERIES,)."""
    half, dim = tl.arange(0, HALF_PAD)[None, :], tl.arange(0, DIM_PAD)[None, :]
    in_half, in_dim = here[:, None] & (half < DIM // 2), here[:, None] & (dim < DIM)
    key_at, wave_at = (token * width + head * DIM)[:, None] + half, (token * DIM)[:, None] + half
    norm_at = (tl.zeros_like(token) + head * DIM)[:, None] + half
    first, second = _rotated(qkv_ptr, waves_ptr, norm_ptr, key_at, wave_at, norm_at, in_half, eps, DIM, HAS_NORM)
    value = tl.load(qkv_ptr + (token * width + (head + n_kv) * DIM)[:, None] + dim, mask=in_dim, other=0.0)
    tl.store(keys_ptr + positions[:, None] * DIM + half, first, mask=in_half)
    tl.store(keys_ptr + positions[:, None] * DIM + half + DIM // 2, second, mask=in_half)
    tl.store(values_ptr + positions[:, None] * DIM + dim, value, mask=in_dim)


@triton.jit(do_not_specialize=["n_queries", "window"])
def _attend_kernel(
    qkv_ptr,
    waves_ptr,
    positions_ptr,
    norm_ptr,
    keys_ptr,
    values_ptr,
    mixed_ptr,
    stats_ptr,
    n_queries,
    n_kv,
    window,
    stride_row,
    stride_head,
    eps,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PACKED: tl.constexpr,
    QUERIES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WINDOWED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    split, head = tl.program_id(0), tl.program_id(1)
    n_packed = n_queries * GROUP
    n_tiles = tl.cdiv(n_packed, PACKED)
    row, tile = tl.program_id(2) // n_tiles, tl.program_id(2) % n_tiles
    query = tl.arange(0, QUERIES)
    positions = tl.load(positions_ptr + row * n_queries + query, mask=query < n_queries, other=-1)  # [QUERIES]
    positions = positions.to(tl.int32)
    last = tl.max(positions)
    start = split * (LANES * CHUNK * CHUNKS)
    if start > last:
        return
    if WINDOWED:
        earliest = tl.min(tl.where(query < n_queries, positions, last))
        if start + LANES * CHUNK * CHUNKS <= earliest - window + 1:
            return
    keys_ptr += row.to(tl.int64) * stride_row + head * stride_head
    values_ptr += row.to(tl.int64) * stride_row + head * stride_head
    STEP: tl.constexpr = LANES * CHUNK
    if OVERLAP:
        if (start + STEP) * DIM <= stride_head:  # nothing is asked from behind the cache
            piece: tl.constexpr = CHUNK * DIM * keys_ptr.dtype.element_ty.primitive_bitwidth // 8 // 32
            thread_at = start * DIM + tl.arange(0, 32 * LANES) * (CHUNK * DIM // 32)
            ask_ahead(keys_ptr + thread_at, piece)
            ask_ahead(values_ptr + thread_at, piece)
        gdc_wait()
        gdc_launch_dependents()

    packed = tile * PACKED + tl.arange(0, PACKED)  # [PACKED], query major
    in_packed = packed < n_packed
    own = tl.load(positions_ptr + row * n_queries + packed // GROUP, mask=in_packed, other=-1).to(tl.int32)  # [PACKED]
    half, dim = tl.arange(0, HALF_PAD), tl.arange(0, DIM_PAD)
    in_half, in_dim = half < DIM // 2, dim < DIM
    width = (n_kv * GROUP + 2 * n_kv) * DIM
    tokens, heads = row * n_queries + packed // GROUP, head * GROUP + packed % GROUP
    query_first, query_second = _rotated(
        qkv_ptr,
        waves_ptr,
        norm_ptr,
        (tokens * width + heads * DIM)[:, None] + half[None, :],  # [PACKED, HALF_PAD]
        (tokens * DIM)[:, None] + half[None, :],
        (heads * DIM)[:, None] + half[None, :],
        in_packed[:, None] & in_half[None, :],
        eps,
        DIM,
        HAS_NORM,
    )
    query_first = tl.broadcast_to(query_first[None, :, :], [LANES, PACKED, HALF_PAD])
    query_second = tl.broadcast_to(query_second[None, :, :], [LANES, PACKED, HALF_PAD])
    top = tl.full([LANES, PACKED], float("-inf"), tl.float32)
    total = tl.zeros([LANES, PACKED], tl.float32)
    mixed = tl.zeros([LANES, PACKED, DIM_PAD], tl.float32)
    # Every warp walks slots of its own (a lane), so that nothing but the last sum crosses warps.
    lane_slots = start + tl.arange(0, LANES)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [LANES, CHUNK]
    n_chunks = 1 if CHUNKS == 1 else tl.minimum(CHUNKS, tl.cdiv(last + 1 - start, STEP)).to(tl.int32)
    for chunk in range(n_chunks):
        begin = start + chunk * STEP
        slots = lane_slots + chunk * STEP
        here = (positions >= begin) & (positions < begin + STEP)  # [QUERIES]
        if tl.max(here.to(tl.int32)) > 0:
            _write(
                qkv_ptr,
                waves_ptr,
                norm_ptr,
                keys_ptr,
                values_ptr,
                positions,
                row * n_queries + query,
                here,
                n_kv * GROUP + head,
                n_kv,
                width,
                eps,
                DIM,
                HALF_PAD,
                DIM_PAD,
                HAS_NORM,
            )
            tl.debug_barrier()
        key_first, key_second, value = _cached(keys_ptr, values_ptr, slots, slots <= last, DIM, HALF_PAD, DIM_PAD)

        scores = tl.dot(query_first, tl.permute(key_first, (0, 2, 1)), input_precision="ieee")
        scores = tl.dot(query_second, tl.permute(key_second, (0, 2, 1)), scores, input_precision="ieee") * scale
        visible = slots[:, None, :] <= own[None, :, None]  # [LANES, PACKED, CHUNK]
        if WINDOWED:
            visible &= slots[:, None, :] > own[None, :, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 2))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, :, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 2)
        mixed *= fade[:, :, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision="ieee")
        top = new_top

    highest = tl.max(top, 0)  # [PACKED]
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    place = ((row * n_kv + head) * tl.num_programs(0) + split) * n_packed + packed  # [PACKED]
    tl.store(stats_ptr + place * 2, highest, mask=in_packed)
    tl.store(stats_ptr + place * 2 + 1, tl.sum(total * share, 0), mask=in_packed)
    mixed = tl.sum(mixed * share[:, :, None], 0)  # [PACKED, DIM_PAD]
    at = place.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(mixed_ptr + at, mixed, mask=in_packed[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["n_queries", "window"])
def _combine_kernel(
    mixed_ptr,
    stats_ptr,
    positions_ptr,
    out_ptr,
    n_queries,
    n_splits,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOWED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token, head, n_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions_ptr + token)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    used = split <= position // SLOTS
    if WINDOWED:
        used &= (split + 1) * SLOTS > position - window + 1
    row = token // n_queries
    group = (row * (n_heads // GROUP) + head // GROUP) * n_splits
    place = (group + split) * (n_queries * GROUP) + (token % n_queries) * GROUP + head % GROUP  # [SPLITS]
    top = tl.load(stats_ptr + place * 2, mask=used, other=float("-inf"))
    total = tl.load(stats_ptr + place * 2 + 1, mask=used, other=0.0)
    at = place.to(tl.int64)[:, None] * DIM + dim[None, :]
    mixed = tl.load(mixed_ptr + at, mask=used[:, None] & (dim < DIM)[None, :], other=0.0)  # [SPLITS, DIM_PAD]
    weights = tl.exp2(top - tl.max(top))
    out = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights)
    tl.store(out_ptr + (token * n_heads + head) * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def attend(
    qkv: Tensor,
    waves: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    window: int | None,
) -> Tensor:
    (batch, queries), (_, n_kv, capacity, dim) = positions.shape, keys.shape
    n_heads = qkv.shape[1] // dim - 2 * n_kv
    group = n_heads // n_kv
    # Warps a program, and slots a warp at a time: as much as registers hold.
    lanes, chunk = (4, 16) if qkv.dtype == torch.float32 else (8, 16) if dim > 64 else (4, 32)
    split = SPLIT * triton.next_power_of_2(triton.cdiv(capacity, SPLIT * MOST_SPLITS))
    n_splits = triton.cdiv(capacity, split)
    packed = min(max(triton.next_power_of_2(queries * group), 16), MOST_PACKED)
    mixed = torch.empty(batch, n_kv, n_splits, queries * group, dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(batch, n_kv, n_splits, queries * group, 2, dtype=torch.float32, device=qkv.device)
    out = torch.empty(batch * queries, n_heads * dim, dtype=qkv.dtype, device=qkv.device)
    overlap = overlaps(qkv.device)
    shared = {"GROUP": group, "DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "WINDOWED": window is not None}
    shared |= {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})
    with torch.cuda.device_of(qkv):
        _attend_kernel[(n_splits, n_kv, batch * triton.cdiv(queries * group, packed))](
            qkv,
            waves,
            positions,
            qk_norm,
            keys,
            values,
            mixed,
            stats,
            queries,
            n_kv,
            window or 0,
            keys.stride(0),
            keys.stride(1),
            eps,
            dim**-0.5 * math.log2(math.e),
            HALF_PAD=max(triton.next_power_of_2(dim // 2), 16),
            PACKED=packed,
            QUERIES=max(triton.next_power_of_2(queries), 2),
            LANES=lanes,
            CHUNK=chunk,
            CHUNKS=split // (lanes * chunk),
            HAS_NORM=qk_norm is not None,
            num_warps=lanes,
            num_stages=1,
            **shared,
        )
        _combine_kernel[(batch * queries, n_heads)](
            mixed,
            stats,
            positions,
            out,
            queries,
            n_splits,
            window or 0,
            SPLITS=max(triton.next_power_of_2(n_splits), 2),
            SLOTS=split,
            num_warps=4,
            **shared,
        )
    return out
