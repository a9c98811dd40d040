"""Triton: what a verdict needs to know of many logits: their maximum, their sum of exponentials, their best token."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from flashspec.kernels.draw import LOG2E, NEVER, _coupled_tile

LARGEST = tl.constexpr(0x7FFFFFFF)
TILE = tl.constexpr(4096)  # tokens a step


@triton.jit
def _softmax_tile(logits_ptr, start, steps, vocab_size, scale, wants_token, LANES: tl.constexpr):
    """Maximum, sum of exponentials (NaN where a logit is NaN or +inf) and, if wanted, the first best token of
    steps * TILE tokens. Every lane keeps its own maximum and sum, so nothing waits for another thread in the loop."""
    place = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    token = start + place  # [TILE // LANES, LANES]
    tops = tl.full([LANES], NEVER, tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.int32)
    for step in range(steps):
        values = tl.load(logits_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        highest = tl.maximum(tl.max(values, 0), tops)
        base = tl.where(highest == NEVER, 0.0, highest)
        totals = totals * tl.exp2((tops - base) * scale) + tl.sum(tl.exp2((values - base[None, :]) * scale), 0)
        first = tl.where(highest > tops, step, first)
        tops = highest
        token += TILE
    top = tl.max(tops, 0)
    base = tl.where(top == NEVER, 0.0, top)
    total = tl.sum(totals * tl.exp2((tops - base) * scale), 0)
    best = start
    if wants_token:
        token = start + first[None, :] * TILE + place
        values = tl.load(logits_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        best = tl.min(tl.min(tl.where(values == top, token, vocab_size - 1), 1), 0)
    return top, total, best


@triton.jit
def _summarise(
    target_ptr,
    draft_ptr,
    maximum_ptr,
    sum_ptr,
    top_ptr,
    sequence,
    start,
    steps,
    gamma,
    draft_length,
    temperature,
    scale,
    seed,
    length,
    vocab_size,
    target_stride_position,
    draft_stride_position,
    VARIANT: tl.constexpr,
    SKIP: tl.constexpr,
    LANES: tl.constexpr,
):
    """A tile's maximum, its sum of exponentials over that, its best token. Sequences: γ + 1 of the target, γ drafted.
    SKIP leaves out what no verdict can need: it costs a load ahead of the logits', and pays for ragged batches."""
    is_draft = sequence > gamma
    position = tl.where(is_draft, sequence - gamma - 1, sequence)
    needed = True
    if SKIP:
        needed = position < tl.where(is_draft, tl.where(temperature == 0, 0, draft_length), draft_length + 1)
    if needed:
        if VARIANT == "coupled":
            logits_ptr = target_ptr + position.to(tl.int64) * target_stride_position
            top, best = _coupled_tile(logits_ptr, seed, length + position, temperature, start, steps, vocab_size)
            total = 1.0
        else:
            if is_draft:
                draft_ptr += position.to(tl.int64) * draft_stride_position
                top, total, best = _softmax_tile(draft_ptr, start, steps, vocab_size, LOG2E, False, LANES)
            else:
                target_ptr += position.to(tl.int64) * target_stride_position
                top, total, best = _softmax_tile(target_ptr, start, steps, vocab_size, scale, temperature == 0, LANES)
        tl.store(maximum_ptr, top)
        tl.store(sum_ptr, total)
        tl.store(top_ptr, best)


@triton.jit
def _combine(
    maxima_ptr, sums_ptr, tops_ptr, first, present, n_tiles, scale, POSITIONS: tl.constexpr, WIDTH: tl.constexpr
):
    """Maximum, sum of exponentials and best token of every position [POSITIONS] from those of its tiles, WIDTH at a
    time: all at once would be 236 registers at γ = 16. Sums stay NaN."""
    top = tl.full([POSITIONS], NEVER, tl.float32)
    total = tl.zeros([POSITIONS], tl.float32)
    best = tl.zeros([POSITIONS], tl.int32)
    for start in range(0, n_tiles, WIDTH):
        tile = start + tl.arange(0, WIDTH)[None, :]
        mask = present[:, None] & (tile < n_tiles)
        index = first[:, None] * n_tiles + tile  # [POSITIONS, WIDTH]
        maxima = tl.load(maxima_ptr + index, mask=mask, other=NEVER, cache_modifier=".cg")
        sums = tl.load(sums_ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
        tops = tl.load(tops_ptr + index, mask=mask, other=0, cache_modifier=".cg")
        here = tl.maximum(tl.max(maxima, 1), top)
        base = tl.where(here == NEVER, 0.0, here)
        total = total * tl.exp2((top - base) * scale) + tl.sum(sums * tl.exp2((maxima - base[:, None]) * scale), 1)
        found = tl.min(tl.where((maxima == here[:, None]) & mask, tops, LARGEST), 1)
        best = tl.where(here > top, found, best)
        top = here
    return top, total, best
