"""Triton: attention of a few new tokens over a KV cache, split over the slots.

A program owns a split of the slots for one kv head and attends with all query heads of the group at once, so that the
cache is read once. It normalises and rotates what it needs itself, and writes the new keys and values that fall into
its split. Splits start at multiples of a fixed length and are combined in their order, so a token's result has the same
bits whatever the other queries, rows and lengths are. Many tokens need no such promise and fill a GPU with few splits:
then a program walks a long one, the next slots under way meanwhile, and the only one of a row needs no combining.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels.decoding import SAME_BITS
from flashspec.kernels.device import leave_l1, overlapped, shared_memory
from flashspec.kernels.draw import LOG2E
from flashspec.kernels.linear import ask_ahead

SPLIT = 128  # slots, up to a capacity of MOST_SPLITS * SPLIT
MOST_SPLITS = 32
WARPS = 4
ENOUGH = 128  # programs, about one for every multiprocessor
# Slots a program where there are many tokens. What is used of a capacity is not known: too few programs keep to LONG.
SHORT, LONG, LONGEST = 256, 512, 2048
WALKED, STAGES = 1 << 14, 3  # bytes of keys a step of a walk, and steps under way
SCRATCH = 24 << 10  # bytes of shared memory beyond what is under way, with some to spare
# Queries times query heads a program; others find the cache in L2. Of 64 both products would be of the wide kind.
MOST_PACKED = 32


@triton.jit
def _heads(new, tokens, heads, used, DIM: tl.constexpr, HALF_PAD: tl.constexpr):
    """Both halves of a head a row as they lie, (rows, HALF_PAD), and where waves are given their cosines and sines.

    new: (queries, keys and values of the tokens, their waves, norms, epsilon, a row's first token, query heads, kv
    heads, elements a token)."""
    qkv_ptr, waves_ptr, _norm_ptr, _eps, _first_token, _n_heads, _n_kv, width = new
    half = tl.arange(0, HALF_PAD)[None, :]
    mask = used[:, None] & (half < DIM // 2)
    head_at, wave_at = (tokens * width + heads * DIM)[:, None] + half, (tokens * DIM)[:, None] + half
    first = tl.load(qkv_ptr + head_at, mask=mask, other=0.0)
    second = tl.load(qkv_ptr + head_at + DIM // 2, mask=mask, other=0.0)
    if waves_ptr is None:
        return first, second
    else:  # noqa: RET505 - Triton decides at compile time between the two
        cos = tl.load(waves_ptr + wave_at, mask=mask, other=0.0)
        return first, second, cos, tl.load(waves_ptr + wave_at + DIM // 2, mask=mask, other=0.0)


@triton.jit
def _rotated(found, new, heads, used, DIM: tl.constexpr, HALF_PAD: tl.constexpr):
    """Both halves of what `_heads` found, normalised and rotated where norms and waves are given."""
    _qkv_ptr, waves_ptr, norm_ptr, eps, _first_token, _n_heads, _n_kv, _width = new
    dtype = found[0].dtype
    first, second = found[0].to(tl.float32), found[1].to(tl.float32)
    if norm_ptr is not None:
        half = tl.arange(0, HALF_PAD)[None, :]
        mask = used[:, None] & (half < DIM // 2)
        norm_at = (heads * DIM)[:, None] + half
        mean = tl.sum(first * first + second * second, 1) / DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        first *= scale * tl.load(norm_ptr + norm_at, mask=mask, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm_ptr + norm_at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if waves_ptr is None:
        return first.to(dtype), second.to(dtype)
    else:  # noqa: RET505 - Triton decides at compile time between the two
        cos, sin = found[2], found[3]
        return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _write(new, cache, head, slots, used, dims, DIM: tl.constexpr, HALF_PAD: tl.constexpr):
    """Put the new keys and values of a row's tokens (QUERIES,) into the cache of a head."""
    qkv_ptr, _waves_ptr, _norm_ptr, _eps, first_token, n_heads, n_kv, width = new
    keys_ptr, values_ptr = cache
    dim, in_dim = dims
    tokens = first_token + tl.arange(0, slots.shape[0])
    heads = tl.zeros_like(tokens) + n_heads + head
    first, second = _rotated(_heads(new, tokens, heads, used, DIM, HALF_PAD), new, heads, used, DIM, HALF_PAD)
    half = tl.arange(0, HALF_PAD)
    in_half = used[:, None] & (half < DIM // 2)[None, :]
    value_at = (tokens * width + (heads + n_kv) * DIM)[:, None] + dim[None, :]
    value = tl.load(qkv_ptr + value_at, mask=used[:, None] & in_dim[None, :], other=0.0)
    half_at, dim_at = slots[:, None] * DIM + half[None, :], slots[:, None] * DIM + dim[None, :]
    tl.store(keys_ptr + half_at, first, mask=in_half)
    tl.store(keys_ptr + half_at + DIM // 2, second, mask=in_half)
    tl.store(values_ptr + dim_at, value, mask=used[:, None] & in_dim[None, :])


@triton.jit
def _cached(cache, slots, used, dims, DIM: tl.constexpr, HALF_PAD: tl.constexpr):
    """Both halves of the keys, and the values, in the cache."""
    keys_ptr, values_ptr = cache
    half, dim = tl.arange(0, HALF_PAD)[None, :], dims[0][None, :]
    slots, used = slots[:, None], used[:, None]
    first = tl.load(keys_ptr + slots * DIM + half, mask=used & (half < DIM // 2), other=0.0)
    second = tl.load(keys_ptr + slots * DIM + half + DIM // 2, mask=used & (half < DIM // 2), other=0.0)
    return first, second, tl.load(values_ptr + slots * DIM + dim, mask=used & (dim < DIM), other=0.0)


@triton.jit
def _ask_and_wait(cache, start, stride_head, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Ask for the first slots while the launch before this one ends."""
    keys_ptr, values_ptr = cache
    if (start + CHUNK) * DIM <= stride_head:  # nothing is asked from behind the cache
        slot_at = (start + tl.arange(0, CHUNK)) * DIM
        piece: tl.constexpr = DIM * (keys_ptr.dtype.element_ty.primitive_bitwidth // 8)
        ask_ahead(keys_ptr + slot_at, piece)
        ask_ahead(values_ptr + slot_at, piece)
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def _capped(scores, CAP: tl.constexpr):
    """CAP * tanh(scores / CAP)."""
    fallen = tl.exp2(tl.abs(scores) * (-2 * LOG2E / CAP))
    size = CAP * (1 - fallen) / (1 + fallen)
    return tl.where(scores < 0, -size, size)


@triton.jit
def _scores(queries, keys, own, slots, scale, window, CAP: tl.constexpr, WINDOWED: tl.constexpr):
    """Of queries at positions `own` and keys in `slots`, both as halves; -inf where hidden: [CHUNK, PACKED]."""
    # Slots are the rows of the scores, so that the number of queries never changes the matrix instruction.
    scores = tl.dot(keys[0], tl.trans(queries[0]), input_precision="ieee")
    scores = tl.dot(keys[1], tl.trans(queries[1]), scores, input_precision="ieee") * scale  # [CHUNK, PACKED]
    if CAP is not None:
        scores = _capped(scores, CAP)
    visible = slots[:, None] <= own[None, :]
    if WINDOWED:
        visible &= slots[:, None] > own[None, :] - window
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _mix(scores, value, top, total, mixed):
    """Highest score, sum of exponentials and values mixed with these scores too: [PACKED] twice, [PACKED, DIM_PAD]."""
    new_top = tl.maximum(top, tl.max(scores, 0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[None, :])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 0)
    # Not values times weights: with two products of the wide kind ptxas 12.8 mixes up their operands' addresses.
    mixed = tl.dot(tl.trans(weights.to(value.dtype)), value, mixed * fade[:, None], input_precision="ieee")
    return new_top, total, mixed


@triton.jit
def _walk(
    cache,
    queries,
    own,
    ends,
    rule,
    dims,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """What the queries see of a split, as in `_mix`. ends: (first slot, chunks that no query sees, last position);
    rule: (window, scale)."""
    start, skipped, last = ends
    window, scale = rule
    PACKED: tl.constexpr = own.shape[0]
    HALF_PAD: tl.constexpr = queries[0].shape[1]
    top = tl.full([PACKED], float("-inf"), tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    mixed = tl.zeros([PACKED, dims[0].shape[0]], tl.float32)
    n_chunks = 1 if CHUNKS == 1 else tl.minimum(CHUNKS, tl.cdiv(last + 1 - start, CHUNK)).to(tl.int32)
    for chunk in range(skipped, n_chunks):
        slots = start + chunk * CHUNK + tl.arange(0, CHUNK)
        key_first, key_second, value = _cached(cache, slots, slots <= last, dims, DIM, HALF_PAD)
        scores = _scores(queries, (key_first, key_second), own, slots, scale, window, CAP, WINDOWED)
        top, total, mixed = _mix(scores, value, top, total, mixed)
    return top, total, mixed


@triton.jit
def _with_sink(sink, top, total, mixed):
    """The sum of exponentials [PACKED], and what is mixed, with a score that has no value."""
    highest = tl.maximum(top, sink)
    fade = tl.exp2(top - highest)
    return total * fade + tl.exp2(sink - highest), mixed * fade[:, None]


@triton.jit
def _store(mixed_ptr, stats_ptr, place, used, top, total, mixed, dims, DIM: tl.constexpr):
    dim, in_dim = dims
    tl.store(stats_ptr + place * 2, top, mask=used)
    tl.store(stats_ptr + place * 2 + 1, total, mask=used)
    at = place.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(mixed_ptr + at, mixed, mask=used[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["n_queries", "n_asked", "window"])
def _attend_kernel(
    qkv_ptr,
    waves_ptr,
    positions_ptr,
    norm_ptr,
    keys_ptr,
    values_ptr,
    sinks_ptr,
    out_ptr,
    mixed_ptr,
    stats_ptr,
    n_queries,
    n_asked,
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
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    ALONE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (splits, kv heads, rows times tiles of the queries). mixed, stats: where the splits' results go; out: where
    the result of the only split goes. ALONE: programs are so few that each has a multiprocessor; the code is the same,
    but the driver is asked for another cut of its memory, which is a function's."""
    split, head = tl.program_id(0), tl.program_id(1)
    n_packed = n_asked * GROUP
    n_tiles = tl.cdiv(n_packed, PACKED)
    row, tile = tl.program_id(2) // n_tiles, tl.program_id(2) % n_tiles
    query = tl.arange(0, QUERIES)
    positions = tl.load(positions_ptr + row * n_queries + query, mask=query < n_queries, other=-1).to(tl.int32)
    packed = tile * PACKED + tl.arange(0, PACKED)  # [PACKED], query major
    used = packed < n_packed
    tokens = row * n_queries + n_queries - n_asked + packed // GROUP  # [PACKED]
    own = tl.load(positions_ptr + tokens, mask=used, other=-1).to(tl.int32)
    last, start = tl.max(own), split * (CHUNK * CHUNKS)
    skipped = 0
    if start > last:
        return
    if WINDOWED:
        # Of all new tokens, as those that are not asked for are written too.
        hidden = tl.min(tl.where(query < n_queries, positions, last)) - window + 1 - start  # slots, or below 0
        if hidden >= CHUNK * CHUNKS:
            return
        if CHUNKS > 1:
            skipped = tl.maximum(hidden, 0) // CHUNK
    head_at = row.to(tl.int64) * stride_row + head * stride_head
    cache = keys_ptr + head_at, values_ptr + head_at
    if OVERLAP:
        _ask_and_wait(cache, start + skipped * CHUNK, stride_head, DIM, CHUNK)

    dim, n_heads = tl.arange(0, DIM_PAD), n_kv * GROUP
    dims = dim, dim < DIM
    new = qkv_ptr, waves_ptr, norm_ptr, eps, row * n_queries, n_heads, n_kv, (n_heads + 2 * n_kv) * DIM
    heads = head * GROUP + packed % GROUP
    found = _heads(new, tokens, heads, used, DIM, HALF_PAD)  # under way while new keys are written
    here = (positions >= start) & (positions < start + CHUNK * CHUNKS) & (positions <= last)  # [QUERIES]
    if tl.max(here.to(tl.int32)) > 0:
        _write(new, cache, head, positions, here, dims, DIM, HALF_PAD)
        tl.debug_barrier()
    queries = _rotated(found, new, heads, used, DIM, HALF_PAD)
    ends, rule = (start, skipped, last), (window, scale)
    top, total, mixed = _walk(cache, queries, own, ends, rule, dims, DIM, CHUNK, CHUNKS, CAP, WINDOWED)
    if out_ptr is None:
        place = ((row * n_kv + head) * tl.num_programs(0) + split) * n_packed + packed  # [PACKED]
        _store(mixed_ptr, stats_ptr, place, used, top, total, mixed, dims, DIM)
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + heads, mask=used, other=0.0).to(tl.float32) * LOG2E
            total, mixed = _with_sink(sink, top, total, mixed)
        place = ((row * n_asked + packed // GROUP) * n_heads + heads).to(tl.int64) * DIM
        out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place[:, None] + dim[None, :], out, mask=used[:, None] & dims[1][None, :])


@triton.jit(do_not_specialize=["n_queries", "n_asked", "window"])
def _combine_kernel(
    mixed_ptr,
    stats_ptr,
    positions_ptr,
    sinks_ptr,
    out_ptr,
    n_queries,
    n_asked,
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
    row, query = token // n_asked, token % n_asked
    position = tl.load(positions_ptr + row * n_queries + n_queries - n_asked + query)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    used = split <= position // SLOTS
    if WINDOWED:
        used &= (split + 1) * SLOTS > position - window + 1
    group = (row * (n_heads // GROUP) + head // GROUP) * n_splits
    place = (group + split) * (n_asked * GROUP) + query * GROUP + head % GROUP  # [SPLITS]
    top = tl.load(stats_ptr + place * 2, mask=used, other=float("-inf"))
    total = tl.load(stats_ptr + place * 2 + 1, mask=used, other=0.0)
    at = place.to(tl.int64)[:, None] * DIM + dim[None, :]
    mixed = tl.load(mixed_ptr + at, mask=used[:, None] & (dim < DIM)[None, :], other=0.0)  # [SPLITS, DIM_PAD]
    highest = tl.max(top)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    weights = tl.exp2(top - highest)
    out, whole = tl.sum(mixed * weights[:, None], 0), tl.sum(total * weights)
    if sinks_ptr is not None:
        whole += tl.exp2(sink - highest)
    out = (out / whole).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * n_heads + head) * DIM + dim, out, mask=dim < DIM)


class Plan(NamedTuple):
    """Slots a program, slots a step of its walk, steps under way."""

    split: int
    chunk: int
    stages: int


def plan(tokens: int, programs: int, capacity: int, dim: int, qkv: Tensor) -> Plan:
    """programs: how many a split has, one for each kv head and tile of the queries."""
    head = triton.next_power_of_2(dim * qkv.itemsize)
    chunk = _fitting(32 if qkv.dtype == torch.float32 else SPLIT, head, qkv.device)
    shortest = triton.next_power_of_2(triton.cdiv(capacity, MOST_SPLITS))
    if tokens <= SAME_BITS:
        return Plan(max(shortest, SPLIT), chunk, 1)
    wanted = triton.next_power_of_2(capacity * min(programs, ENOUGH) // ENOUGH)
    split = max(shortest, SHORT, min(wanted, LONG if programs < ENOUGH else LONGEST))
    chunk = min(chunk, max(WALKED // head, 16))
    if qkv.dtype == torch.float32:  # its products are no matrix instructions, and registers are short
        return Plan(split, chunk, 1)
    under_way = (shared_memory(qkv.device) - SCRATCH) // (2 * chunk * head)  # besides the step that is worked on
    return Plan(split, chunk, min(STAGES, 1 + max(under_way, 0)))


def _fitting(chunk: int, head: int, device: torch.device) -> int:
    """Slots a step, halved until keys, values and the most queries fit, which take so many bytes a head."""
    while (2 * chunk + MOST_PACKED) * head > shared_memory(device) and chunk > 16:
        chunk //= 2
    return chunk


def attend(
    qkv: Tensor,
    waves: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    asked: int | None = None,
) -> Tensor:
    """As `kernels.decoding` says."""
    (batch, queries), (_, n_kv, capacity, dim) = positions.shape, keys.shape
    n_heads = qkv.shape[1] // dim - 2 * n_kv
    group, asked = n_heads // n_kv, asked or queries
    packed = min(max(triton.next_power_of_2(asked * group), 16), MOST_PACKED)
    tiles = batch * triton.cdiv(asked * group, packed)
    cut = plan(batch * queries, n_kv * tiles, capacity, dim, qkv)
    n_splits = triton.cdiv(capacity, cut.split)
    alone = batch * queries <= SAME_BITS and n_splits * n_kv * tiles <= ENOUGH
    out = torch.empty(batch * asked, n_heads * dim, dtype=qkv.dtype, device=qkv.device)
    mixed = stats = None
    if n_splits > 1:
        mixed = torch.empty(batch, n_kv, n_splits, asked * group, dim, dtype=torch.float32, device=qkv.device)
        stats = torch.empty(batch, n_kv, n_splits, asked * group, 2, dtype=torch.float32, device=qkv.device)
    shared = {"GROUP": group, "DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "WINDOWED": window is not None}
    shared |= overlapped(qkv.device)
    tensors = qkv, waves, positions, qk_norm, keys, values, sinks, out if n_splits == 1 else None, mixed, stats
    numbers = queries, asked, n_kv, window or 0, keys.stride(0), keys.stride(1), eps, (scale or dim**-0.5) * LOG2E.value
    with torch.cuda.device_of(qkv):
        launched = _attend_kernel[(n_splits, n_kv, tiles)](
            *tensors,
            *numbers,
            HALF_PAD=max(triton.next_power_of_2(dim // 2), 16),
            PACKED=packed,
            QUERIES=max(triton.next_power_of_2(queries), 2),
            CHUNK=cut.chunk,
            CHUNKS=cut.split // cut.chunk,
            CAP=softcap and softcap * LOG2E.value,
            ALONE=alone,
            num_warps=WARPS,
            num_stages=cut.stages,
            **shared,
        )
        if alone:
            leave_l1(launched, qkv.device)
        if n_splits == 1:
            return out
        _combine_kernel[(batch * asked, n_heads)](
            mixed,
            stats,
            positions,
            sinks,
            out,
            queries,
            asked,
            n_splits,
            window or 0,
            SPLITS=max(triton.next_power_of_2(n_splits), 2),
            SLOTS=cut.split,
            num_warps=4,
            maxnreg=255,  # or ptxas saves registers and loads a few at a time
            **shared,
        )
    return out
