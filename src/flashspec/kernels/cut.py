"""Triton: where top-k, top-p and min-p cut. One program a position, two passes over its logits, one launch.

The first pass keeps maximum and mass of each of LANES interleaved groups of tokens: enough to say what the cut lies
above. The second sets aside the tokens above that, each group its own, and the cut is found among them by halving.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashspec.kernels.draw import LOG2E, MIN_HEAT, NEVER
from flashspec.kernels.fused import strided

LANES = tl.constexpr(4096)
DEEP = tl.constexpr(4)  # tokens of a lane that are loaded at once, as _set_aside spells out
HALVINGS = tl.constexpr(14)  # of the bound; it decides what is set aside, not what is cut


@triton.jit
def _load(logits_ptr, start, part, vocab_size, other):
    """LANES logits, four a thread whatever their type: other layouts are exchanged through shared memory."""
    token = tl.max_contiguous(start + part * LANES + tl.arange(0, LANES), 4)
    return tl.load(logits_ptr + token, mask=token < vocab_size, other=other).to(tl.float32)


@triton.jit
def _statistics(logits_ptr, vocab_size, scale):
    """Maximum and sum of exponentials over it of every lane's tokens: lane i has tokens i, i + LANES, ..."""
    tops = tl.full([LANES], NEVER, tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, DEEP * LANES):
        for part in tl.static_range(DEEP):
            values = _load(logits_ptr, start, part, vocab_size, NEVER)
            highest = tl.maximum(values, tops)
            base = tl.where(highest == NEVER, 0.0, highest)
            totals = totals * tl.exp2((tops - base) * scale) + tl.exp2((values - base) * scale)
            tops = highest
    return tops, totals


@triton.jit
def _bound(tops, sizes, wanted):
    """A value at or above which maxima of total size `wanted` lie, close to the highest such; -inf if there is none."""
    high = tl.max(tops, 0)
    low = tl.min(tl.where(tops == NEVER, high, tops), 0)
    enough = tl.sum(tl.where(tops >= low, sizes, 0.0), 0) >= wanted
    for _ in range(HALVINGS):
        middle = (low + high) * 0.5
        holds = tl.sum(tl.where(tops >= middle, sizes, 0.0), 0) >= wanted
        low, high = tl.where(holds, middle, low), tl.where(holds, high, middle)
    return tl.where(enough, low, NEVER)


@triton.jit
def _keep(aside_ptr, counts, values, low):
    kept = values >= low
    tl.store(aside_ptr + counts.to(tl.int64) * LANES + tl.arange(0, LANES), values, mask=kept)
    return counts + kept.to(tl.int32)


@triton.jit
def _set_aside(logits_ptr, aside_ptr, vocab_size, low):
    """Every lane's tokens from `low` on, in aside (depth, LANES); how many each has. Loads go ahead of the stores."""
    counts = tl.zeros([LANES], tl.int32)
    for start in range(0, vocab_size, DEEP * LANES):
        values0 = _load(logits_ptr, start, 0, vocab_size, float("nan"))
        values1 = _load(logits_ptr, start, 1, vocab_size, float("nan"))
        values2 = _load(logits_ptr, start, 2, vocab_size, float("nan"))
        values3 = _load(logits_ptr, start, 3, vocab_size, float("nan"))
        counts = _keep(aside_ptr, counts, values0, low)
        counts = _keep(aside_ptr, counts, values1, low)
        counts = _keep(aside_ptr, counts, values2, low)
        counts = _keep(aside_ptr, counts, values3, low)
    return counts


@triton.jit
def _flip(bits):
    """Bits of a float32 to an integer that is ordered as the floats are, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weigh(values, cut, top, scale, COUNT: tl.constexpr):
    """1, or its probability up to a factor, for every value that is not under the cut."""
    weights = tl.full([], 1.0, tl.float32)
    if not COUNT:
        weights = tl.exp2((values - top) * scale)
    return tl.where(values >= cut, weights, 0.0)


@triton.jit
def _size(aside, cut, COUNT: tl.constexpr):
    """How many tokens are not under the cut, or their mass."""
    aside_ptr, counts, depth, first, second, top, scale = aside
    lane = tl.arange(0, LANES)
    sizes = _weigh(first, cut, top, scale, COUNT) + _weigh(second, cut, top, scale, COUNT)
    for deeper in range(2, depth):
        values = tl.load(aside_ptr + deeper * LANES + lane, mask=deeper < counts, other=float("nan"))
        sizes += _weigh(values, cut, top, scale, COUNT)
    return tl.sum(sizes, 0)


@triton.jit
def _edge(aside, low, wanted, COUNT: tl.constexpr):
    """The highest value from `low` on that keeps at least `wanted`; `low` if none does."""
    _aside_ptr, _counts, _depth, _first, _second, top, _scale = aside
    least = _flip(low.to(tl.int32, bitcast=True)).to(tl.int64)
    most = _flip(top.to(tl.int32, bitcast=True)).to(tl.int64)
    while least < most:
        middle = least + (most - least + 1) // 2
        cut = _flip(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        holds = _size(aside, cut, COUNT) >= wanted
        least, most = tl.where(holds, middle, least), tl.where(holds, most, middle - 1)
    return _flip(least.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _cut_kernel(logits, rows, floors_ptr, aside_ptr, vocab_size):
    """Grid (Q, B)."""
    position, row = tl.program_id(0), tl.program_id(1)
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr = rows
    index = row * tl.num_programs(0) + position
    logits_ptr = logits[0] + row.to(tl.int64) * logits[1] + position.to(tl.int64) * logits[2]
    scale = 1.0 / tl.maximum(tl.load(temperature_ptr + row), MIN_HEAT) * LOG2E
    tops, totals = _statistics(logits_ptr, vocab_size, scale)
    top = tl.max(tops, 0)
    totals = tl.where(totals == 0, 0.0, totals * tl.exp2((tops - top) * scale))
    total = tl.sum(totals, 0)
    floor = tl.full([], NEVER, tl.float32)
    if (tl.abs(top) < float("inf")) & (total == total):
        counted, shared = False, False
        low = floor
        if top_p_ptr is not None:
            top_p = tl.load(top_p_ptr + row)
            shared = top_p < 1
            # All that lies below this is less than 1 - top_p, if it were the whole vocabulary.
            rest = tl.log2(tl.maximum(1 - top_p, 1e-30) * total / vocab_size) / scale - 1e-3 * tl.abs(top)
            powers = tl.where(tops == NEVER, 0.0, tl.exp2((tops - top) * scale))
            low = tl.where(shared, tl.maximum(_bound(tops, powers, top_p * total * 1.0001), top + rest), low)
        if top_k_ptr is not None:
            top_k = tl.load(top_k_ptr + row).to(tl.float32)
            counted = top_k > 0
            ones = tl.where(tops == NEVER, 0.0, 1.0)
            low = tl.where(counted, _bound(tops, ones, top_k), low)  # its mass is needed from the last of them on
        if counted | shared:
            depth = tl.cdiv(vocab_size, LANES)
            aside_ptr += index.to(tl.int64) * depth * LANES
            counts = _set_aside(logits_ptr, aside_ptr, vocab_size, low)
            tl.debug_barrier()
            lane = tl.arange(0, LANES)
            first = tl.load(aside_ptr + lane, mask=counts > 0, other=float("nan"))
            second = tl.load(aside_ptr + LANES + lane, mask=counts > 1, other=float("nan"))
            aside = aside_ptr, counts, tl.max(counts, 0), first, second, top, scale
            floor = low
            if top_k_ptr is not None:  # noqa: SIM102
                if counted:
                    floor = _edge(aside, low, top_k, True)
                    total = _size(aside, floor, False)
            if top_p_ptr is not None:  # noqa: SIM102
                if shared:
                    floor = _edge(aside, floor, top_p * total, False)
        if min_p_ptr is not None:
            floor = tl.maximum(floor, top + tl.log2(tl.load(min_p_ptr + row)) / scale)
    tl.store(floors_ptr + index, floor)


def cut_floors(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    batch_size, positions, vocab_size = logits.shape
    floors = torch.empty(batch_size, positions, dtype=torch.float32, device=logits.device)
    if not floors.numel():
        return floors
    room = floors.numel() * triton.cdiv(vocab_size, LANES.value) * LANES.value
    searched = top_k is not None or top_p is not None
    aside = torch.empty(room if searched else 1, dtype=torch.float32, device=logits.device)
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in (temperature, top_k, top_p, min_p))
    with torch.cuda.device_of(logits):
        _cut_kernel[(positions, batch_size)](strided(logits), rows, floors, aside, vocab_size, num_warps=16)
    return floors
