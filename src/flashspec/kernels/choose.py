"""Triton: a draft token from a drafter's logits. One launch races tiles of the vocabulary, a second their winners."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashspec.kernels.draw import LARGEST, NEVER, STEP, _first, _gumbel_race
from flashspec.kernels.fused import pieces, processors


@triton.jit(do_not_specialize=["purpose", "steps"])
def _tiles_kernel(logits, bias, weights, rows, table_ptr, purpose, vocab_size, steps):
    """Grid (tiles, B). Writes a tile's best score, its token and the largest logit to table (3, B, tiles)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    seeds_ptr, positions_ptr, temperature_ptr, floors_ptr = rows
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
        tl.load(positions_ptr + row),
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


@triton.jit(do_not_specialize=["n_tiles"])
def _winner_kernel(table_ptr, token_ids_ptr, finite_ptr, n_tiles, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    tile = tl.arange(0, WIDTH)  # [WIDTH]
    mask = tile < n_tiles
    plane = tl.num_programs(0) * n_tiles
    entry = table_ptr + row * n_tiles + tile
    scores = tl.load(entry, mask=mask, other=NEVER)
    places = tl.load(entry + plane, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    tops = tl.load(entry + 2 * plane, mask=mask, other=NEVER)
    best = _first(scores, tl.where(mask, places, LARGEST), tl.max(scores, 0))
    tl.store(token_ids_ptr + row, best.to(tl.int64))
    tl.store(finite_ptr + row, tl.abs(tl.max(tops, 0)) < float("inf"))


def choose_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    purpose: int | None,
    bias: Tensor | None = None,
    floors: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch_size, vocab_size = logits.shape
    token_ids = torch.empty(batch_size, dtype=torch.int64, device=logits.device)
    finite = torch.empty(batch_size, dtype=torch.bool, device=logits.device)
    if not batch_size:
        return token_ids, finite
    steps, n_tiles = pieces(batch_size, vocab_size, STEP.value, processors(logits.device))
    table = torch.empty(3 * batch_size * n_tiles, dtype=torch.float32, device=logits.device)
    rows = (seeds, positions, temperature, floors)
    with torch.cuda.device_of(logits):
        _tiles_kernel[(n_tiles, batch_size)](
            _matrix(logits),
            None if bias is None else _matrix(bias),
            None if weights is None else (weights, weights.stride(0)),
            tuple(None if tensor is None else tensor.contiguous() for tensor in rows),
            table,
            purpose or 0,
            vocab_size,
            steps,
            num_warps=8,
        )
        _winner_kernel[(batch_size,)](table, token_ids, finite, n_tiles, WIDTH=triton.next_power_of_2(n_tiles))
    return token_ids, finite


def _matrix(rows: Tensor) -> tuple[Tensor, int]:
    """(B, V) as a kernel takes it: tokens side by side, stride of a row."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
