"""Triton: what a verdict needs to know of many logits: their maximum, their sum of exponentials, their best token."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels.draw import LARGEST, LOG2E, MIN_HEAT, NEVER, STEP, _gumbel_race
from flashspec.kernels.reference_fused import TOKEN

FOR_TOKEN = tl.constexpr(TOKEN)
TILE = tl.constexpr(4096)  # tokens a step of a summary


@triton.jit
def _softmax_tile(
    logits_ptr,
    floor,
    scale,
    start,
    steps,
    vocab_size,
    wants_token,
    MOMENT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of steps * TILE tokens, those under the floor left out: maximum, sum of exponentials over it (NaN where a logit
    is NaN or +inf), if wanted the first best token, and with MOMENT the exponentials' sum of exponents in base 2.
    Every lane keeps its own, so nothing waits for another thread in the loop."""
    place = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    token = start + place  # [TILE // LANES, LANES]
    tops = tl.full([LANES], NEVER, tl.float32)
    totals = tl.zeros([LANES], tl.float32)
    moments = tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.int32)
    for step in range(steps):
        values = tl.load(logits_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        if floor is not None:
            values = tl.where(values < floor, NEVER, values)
        highest = tl.maximum(tl.max(values, 0), tops)
        base = tl.where(highest == NEVER, 0.0, highest)
        shrink = tl.exp2((tops - base) * scale)
        exponents = (values - base[None, :]) * scale
        powers = tl.exp2(exponents)
        if MOMENT:
            moments = _carry(moments, totals, (tops - base) * scale)
            moments += tl.sum(tl.where(powers > 0, powers * exponents, 0.0), 0)
        totals = totals * shrink + tl.sum(powers, 0)
        first = tl.where(highest > tops, step, first)
        tops = highest
        token += TILE
    top = tl.max(tops, 0)
    base = tl.where(top == NEVER, 0.0, top)
    shift = (tops - base) * scale
    moment = tl.sum(_carry(moments, totals, shift), 0)
    total = tl.sum(totals * tl.exp2(shift), 0)
    best = start
    if wants_token:
        token = start + first[None, :] * TILE + place
        values = tl.load(logits_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        best = tl.min(tl.min(tl.where(values == top, token, vocab_size - 1), 1), 0)
    return top, total, best, moment


@triton.jit
def _carry(moments, totals, shift):
    """Moments under a maximum that is higher by -shift, in exponents of 2."""
    return tl.where(totals > 0, (moments + totals * shift) * tl.exp2(shift), 0.0)


@triton.jit
def _row_at(logits, row, position):
    """Where a position's logits begin. logits: as from `strided`."""
    return logits[0] + row.to(tl.int64) * logits[1] + position.to(tl.int64) * logits[2]


@triton.jit
def _which(sequence, sequences, gamma, raw):
    """A sequence's position, and whether it is a draft's or raw."""
    is_raw, is_draft = False, sequence > gamma
    position = tl.where(is_draft, sequence - gamma - 1, sequence)
    if raw is not None:
        first_raw = sequences - gamma - 1
        is_raw = sequence >= first_raw
        is_draft &= sequence < first_raw
        position = tl.where(is_raw, sequence - first_raw, position)
    return position, is_draft, is_raw


@triton.jit
def _raw_tile(raw_ptr, start, steps, vocab_size, VARIANT: tl.constexpr, LANES: tl.constexpr):
    end, raw_steps = vocab_size, steps
    if VARIANT == "coupled":  # its pieces are no whole tiles
        end, raw_steps = tl.minimum(start + steps * STEP, vocab_size), tl.cdiv(steps * STEP, TILE)
    return _softmax_tile(raw_ptr, None, LOG2E, start, raw_steps, end, False, False, LANES)


@triton.jit
def _tested_tile(
    target_ptr,
    draft,
    token,
    floor,
    scale,
    row,
    position,
    is_draft,
    wants_token,
    start,
    steps,
    vocab_size,
    VARIANT: tl.constexpr,
    LANES: tl.constexpr,
):
    """The logit of the draft token, and a tile of the target's logits or of the draft's."""
    known = (token >= 0) & (token < vocab_size)
    if draft is not None and is_draft:
        draft_ptr = _row_at(draft, row, position)
        chosen = tl.load(draft_ptr + token, mask=known, other=0.0).to(tl.float32)
        top, total, best, moment = _softmax_tile(draft_ptr, None, LOG2E, start, steps, vocab_size, False, False, LANES)
    else:
        chosen = tl.load(target_ptr + token, mask=known, other=0.0).to(tl.float32)
        if floor is not None:
            chosen = tl.where(chosen < floor, NEVER, chosen)
        top, total, best, moment = _softmax_tile(
            target_ptr, floor, scale, start, steps, vocab_size, wants_token, VARIANT == "typical", LANES
        )
    return chosen, top, total, best, moment


@triton.jit(do_not_specialize=["gamma", "steps"])
def _summary_kernel(
    target,
    draft,
    raw,
    rows,
    table_ptr,
    state_ptr,
    gamma,
    vocab_size,
    steps,
    VARIANT: tl.constexpr,
    SKIP: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tiles, sequences, B); sequences: γ + 1 of the target, then γ drafted, then γ + 1 raw, each if it is there.
    Writes a tile's maximum, sum, best token and moment to table (4, B, sequences, tiles), behind it a sequence's logit
    of the draft token, and zeroes the state. SKIP leaves out what no verdict can need: a load ahead of the logits' that
    pays for ragged batches."""
    tile, sequence, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token_ids_ptr, draft_lengths_ptr, seeds_ptr, lengths_ptr, temperature_ptr, floors_ptr = rows
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sequences, n_tiles = tl.num_programs(1), tl.num_programs(0)
    index = row * sequences + sequence
    plane = tl.num_programs(2) * sequences * n_tiles
    position, is_draft, is_raw = _which(sequence, sequences, gamma, raw)
    temperature = tl.load(temperature_ptr + row) if VARIANT != "greedy" else 0.0
    floor = tl.load(floors_ptr + row * (gamma + 1) + position) if floors_ptr is not None else None
    scale = 1.0 / tl.maximum(temperature, MIN_HEAT) * LOG2E
    target_ptr = _row_at(target, row, position)
    if (tile == 0) & (sequence == 0):
        tl.store(state_ptr + 2 * row + tl.arange(0, 2), tl.zeros([2], tl.int64))
    needed = True
    if SKIP:
        draft_length = tl.load(draft_lengths_ptr + row)
        needed = position < tl.where(is_draft, tl.where(temperature == 0, 0, draft_length), draft_length + 1)
    if needed:
        start = tile * steps * (STEP if VARIANT == "coupled" else TILE)
        if raw is not None and is_raw:
            top, total, best, moment = _raw_tile(_row_at(raw, row, position), start, steps, vocab_size, VARIANT, LANES)
        elif VARIANT == "coupled":
            noise = tl.load(seeds_ptr + row), tl.load(lengths_ptr + row) + position, FOR_TOKEN
            best, top, _top = _gumbel_race(target_ptr, None, None, floor, temperature, *noise, start, steps, vocab_size)
            total = 1.0
        else:
            token = tl.load(token_ids_ptr + row * gamma + position, mask=(tile == 0) & (position < gamma), other=-1)
            chosen, top, total, best, moment = _tested_tile(
                target_ptr, draft, token, floor, scale, row, position, is_draft, temperature == 0,
                start, steps, vocab_size, VARIANT, LANES,
            )  # fmt: skip
            if tile == 0:
                tl.store(table_ptr + 4 * plane + index, chosen)
        entry = table_ptr + index * n_tiles + tile
        tl.store(entry, top)
        tl.store(entry + plane, total)
        tl.store(entry + 2 * plane, best.to(tl.float32, bitcast=True))
        if VARIANT == "typical":
            tl.store(entry + 3 * plane, moment)


@triton.jit
def _combine(
    table_ptr, plane, first, present, n_tiles, scale, VARIANT: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    """Maximum, sum of exponentials, best token and moment of sequences [N] from those of their tiles, WIDTH at a
    time: all at once would be 236 registers at γ = 16. Sums stay NaN."""
    top = tl.where(present, NEVER, NEVER)
    total = tl.where(present, 0.0, 0.0)
    moment = total
    best = tl.where(present, 0, 0)
    for chunk in tl.static_range(CHUNKS):
        tile = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = present[:, None] & (tile < n_tiles)
        entry = table_ptr + first[:, None] * n_tiles + tile  # [N, WIDTH]
        maxima = tl.load(entry, mask=mask, other=NEVER)
        sums = tl.load(entry + plane, mask=mask, other=0.0)
        bests = tl.load(entry + 2 * plane, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        here = tl.maximum(tl.max(maxima, 1), top)
        base = tl.where(here == NEVER, 0.0, here)
        shift, shifts = (top - base) * scale, (maxima - base[:, None]) * scale
        if VARIANT == "typical":
            moments = tl.load(entry + 3 * plane, mask=mask, other=0.0)
            moment = _carry(moment, total, shift) + tl.sum(_carry(moments, sums, shifts), 1)
        total = total * tl.exp2(shift) + tl.sum(sums * tl.exp2(shifts), 1)
        found = tl.min(tl.where((maxima == here[:, None]) & mask, bests, LARGEST), 1)
        best = tl.where(here > top, found, best)
        top = here
    return top, total, best, moment
