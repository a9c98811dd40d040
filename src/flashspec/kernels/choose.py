"""Triton: a draft token from a drafter's logits. One launch races tiles of the vocabulary, a second their winners."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.core import Draft
from flashspec.kernels.device import overlapped
from flashspec.kernels.draw import LARGEST, NEVER, STEP, _first, _gumbel_race
from flashspec.kernels.fused import pieces, processors


@triton.jit(do_not_specialize=["offset", "purpose", "steps"])
def _tiles_kernel(logits, bias, weights, rows, table_ptr, offset, purpose, vocab_size, steps, OVERLAP: tl.constexpr):
    """Grid (tiles, B). Writes a tile's best score, its token and the largest logit to table (3, B, tiles)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    seeds_ptr, lengths_ptr, temperature_ptr, floors_ptr = rows
    floor = tl.load(floors_ptr + row) if floors_ptr is not None else None
    bias_ptr = bias[0] + row.to(tl.int64) * bias[1] if bias is not None else None
    weights_ptr = weights[0] + row.to(tl.int64) * weights[1] if weights is not None else None
    best, score, top = _gumbel_race(
        logits[0] + row.to(tl.int64) * logits[1],
        bias_ptr,
        weights_ptr,
        floor,
        tl.load(temperature_ptr + row),
        tl.load(seeds_ptr + row),
        tl.load(lengths_ptr + row) + offset,
        purpose,
        tile * steps * STEP,
        steps,
        vocab_size,
    )
    plane = tl.num_programs(1) * tl.num_programs(0)
    entry = table_ptr + row * tl.num_programs(0) + tile
    tl.store(entry, score)
    tl.store(entry + plane, best.to(tl.float32, bitcast=True))
    tl.store(entry + 2 * plane, top)


@triton.jit(do_not_specialize=["offset", "gamma", "n_tiles", "least"])
def _winner_kernel(
    table_ptr, draft, lengths_ptr, part_ptr, offset, gamma, n_tiles, least, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.arange(0, WIDTH)  # [WIDTH]
    mask = tile < n_tiles
    plane = tl.num_programs(0) * n_tiles
    entry = table_ptr + row * n_tiles + tile
    scores = tl.load(entry, mask=mask, other=NEVER)
    places = tl.load(entry + plane, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    tops = tl.load(entry + 2 * plane, mask=mask, other=NEVER)
    best = _first(scores, tl.where(mask, places, LARGEST), tl.max(scores, 0)).to(tl.int64)
    if part_ptr is not None:
        best = tl.load(part_ptr + best)
    token_ids_ptr, draft_lengths_ptr, faulty_ptr = draft
    tl.store(token_ids_ptr + row * gamma + offset, best)
    finite = tl.abs(tl.max(tops, 0)) < float("inf")
    if offset == 0:
        goes_on = tl.load(lengths_ptr + row) >= least
        tl.store(draft_lengths_ptr + row, (goes_on & finite).to(tl.int64))
        tl.store(faulty_ptr + row, goes_on & (finite == 0))
    elif tl.load(draft_lengths_ptr + row) == offset:
        tl.store(draft_lengths_ptr + row, offset + finite.to(tl.int64))
        tl.store(faulty_ptr + row, finite == 0)


def choose_tokens(
    logits: Tensor,
    draft: Draft,
    offset: int,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    purpose: int | None,
    part: Tensor | None = None,
    bias: Tensor | None = None,
    floors: Tensor | None = None,
    least: int = 1,
) -> None:
    (batch_size, vocab_size), gamma = logits.shape, draft.token_ids.shape[1]
    if not batch_size:
        return
    steps = batch_size * triton.cdiv(vocab_size, STEP.value) // processors(logits.device)
    steps, n_tiles = pieces(vocab_size, STEP.value, steps)
    table = torch.empty(3 * batch_size * n_tiles, dtype=torch.float32, device=logits.device)
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in (seeds, lengths, temperature, floors))
    overlap = overlapped(logits.device)
    with torch.cuda.device_of(logits):
        _tiles_kernel[(n_tiles, batch_size)](
            _matrix(logits),
            None if bias is None else _matrix(bias),
            None if draft.logits is None else _matrix(draft.logits[:, offset]),
            rows,
            table,
            offset,
            purpose or 0,
            vocab_size,
            steps,
            num_warps=8,
            **overlap,
        )
        _winner_kernel[(batch_size,)](
            table,
            (draft.token_ids, draft.lengths, draft.faulty),
            rows[1],
            None if part is None else part.contiguous(),
            offset,
            gamma,
            n_tiles,
            least,
            WIDTH=triton.next_power_of_2(n_tiles),
            **overlap,
        )


def _matrix(rows: Tensor) -> tuple[Tensor, int]:
    """(B, V) as a kernel takes it: tokens side by side, stride of a row."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
