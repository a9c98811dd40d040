"""Triton: raw logits to verdicts, one pass over the vocabulary.

Two launches. The first zeroes the counters. In the second every program does one piece of one row: it either
summarises a tile of one position's logits, or waits until all tiles of its row are summarised, decides the row, and
draws the next token from a slice of the one position that needs a draw. A row's drawing programs come `lookahead` rows
behind its tiles: by then the tiles are done, and what is read twice is still in the cache. Programs start in the order
of their ids, so one that waits never keeps what it waits for from running.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashspec.kernels.draw import LOG2E, MIN_HEAT, STEP, _draw
from flashspec.kernels.noise import _random_words
from flashspec.kernels.reference_fused import ACCEPT
from flashspec.kernels.summary import TILE, _combine, _summarise

FOR_ACCEPT = tl.constexpr(ACCEPT)
PIECES, MOST_STEPS = 6, 8  # swept on an H200 at B = 32: 4 and 16 steps are up to a quarter slower
RESIDENT = 4  # programs that share a multiprocessor


@triton.jit(do_not_specialize=["n_words"])
def _reset_kernel(state_ptr, n_words, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(state_ptr + index, tl.zeros([BLOCK], tl.int64), mask=index < n_words)


@triton.jit
def _one(values, places, place):
    """The element of values [N] at places == place."""
    return tl.sum(tl.where(places == place, values, 0), 0)


@triton.jit
def _finish(
    target_ptr,
    draft_ptr,
    token_ids_ptr,
    maxima_ptr,
    sums_ptr,
    tops_ptr,
    state_ptr,
    num_accepted_ptr,
    next_token_ptr,
    failed_ptr,
    row,
    item,
    gamma,
    draft_length,
    temperature,
    scale,
    seed,
    length,
    vocab_size,
    target_stride_position,
    draft_stride_position,
    sequences,
    n_tiles,
    n_draws,
    draw_steps,
    VARIANT: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Waits for a row's summaries, decides it, and makes one slice of its draw."""
    position = tl.arange(0, POSITIONS)  # [POSITIONS]
    token = tl.load(token_ids_ptr + position, mask=position < gamma, other=-1)
    known = (token >= 0) & (token < vocab_size)
    if VARIANT == "rejection":
        place = position.to(tl.int64) * target_stride_position + token
        chosen = tl.load(target_ptr + place, mask=known, other=0.0).to(tl.float32)
        words, _word1, _word2, _word3 = _random_words(
            seed, length + position, tl.full([], FOR_ACCEPT, tl.int32), tl.zeros([POSITIONS], tl.int32)
        )
        log_u = tl.log((((words >> 8) | 1).to(tl.float32) * (1.0 / (1 << 24))).to(tl.float64)).to(tl.float32)
        drafted = tl.zeros([POSITIONS], tl.float32)
        if HAS_DRAFT:
            place = position.to(tl.int64) * draft_stride_position + token
            drafted = tl.load(draft_ptr + place, mask=known, other=0.0).to(tl.float32)
    while tl.atomic_add(state_ptr, tl.full([], 0, tl.int64), sem="acquire") < sequences * n_tiles:
        pass

    present = position <= draft_length
    top, total, best = _combine(
        maxima_ptr, sums_ptr, tops_ptr, row * sequences + position, present, n_tiles, scale, POSITIONS, WIDTH
    )
    finite = tl.abs(top) < float("inf")
    if VARIANT != "coupled":
        finite &= total == total
    passed = token == best
    draft_top = tl.zeros([POSITIONS], tl.float32)
    draft_total = draft_top + 1.0
    if VARIANT == "rejection":  # noqa: SIM102
        if temperature != 0:
            heat = tl.maximum(temperature, MIN_HEAT)
            log_ratio = tl.div_rn(chosen, heat) - tl.div_rn(top, heat) - tl.log(total)
            if HAS_DRAFT:
                within = position < draft_length
                first = row * sequences + gamma + 1 + position
                draft_top, draft_total, _best = _combine(
                    maxima_ptr, sums_ptr, tops_ptr, first, within, n_tiles, LOG2E, POSITIONS, WIDTH
                )
                log_ratio -= drafted - draft_top - tl.log(draft_total)
            passed = log_u < log_ratio
    passed &= known & finite & (position < draft_length)
    num_accepted = tl.min(tl.where(passed, POSITIONS, position), 0)
    if item == 0:
        tl.store(num_accepted_ptr, num_accepted.to(tl.int64))
        tl.store(failed_ptr, tl.max(((position <= num_accepted) & (finite == 0)).to(tl.int32), 0) != 0)

    if (VARIANT == "coupled") | (temperature == 0):
        if item == 0:
            tl.store(next_token_ptr, _one(best, position, num_accepted).to(tl.int64))
    else:
        rejected = num_accepted < draft_length
        _draw(
            target_ptr + num_accepted.to(tl.int64) * target_stride_position,
            draft_ptr + num_accepted.to(tl.int64) * draft_stride_position,
            next_token_ptr,
            state_ptr,
            _one(top, position, num_accepted),
            tl.log2(_one(total, position, num_accepted)),
            scale,
            _one(draft_top, position, num_accepted),
            tl.log2(_one(draft_total, position, num_accepted)),
            _one(token, position, num_accepted),
            rejected,
            seed,
            length + num_accepted,
            item * draw_steps,
            draw_steps,
            n_draws,
            vocab_size,
            HAS_DRAFT,
        )


@triton.jit(do_not_specialize=["batch_size", "gamma", "steps", "n_tiles", "n_draws", "draw_steps", "lookahead"])
def _verify_kernel(
    target_ptr,
    draft_ptr,
    token_ids_ptr,
    draft_lengths_ptr,
    seeds_ptr,
    lengths_ptr,
    temperature_ptr,
    maxima_ptr,
    sums_ptr,
    tops_ptr,
    state_ptr,
    num_accepted_ptr,
    next_token_ptr,
    failed_ptr,
    batch_size,
    gamma,
    vocab_size,
    target_stride_row,
    target_stride_position,
    draft_stride_row,
    draft_stride_position,
    steps,
    n_tiles,
    n_draws,
    draw_steps,
    lookahead,
    VARIANT: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    SKIP: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    sequences = gamma + 1
    if HAS_DRAFT:
        sequences += gamma
    n_summaries = sequences * n_tiles
    row, item = _assignment(batch_size, n_summaries, n_draws, lookahead)
    state_ptr += row.to(tl.int64) * 4
    draft_ptr += row.to(tl.int64) * draft_stride_row
    target_ptr += row.to(tl.int64) * target_stride_row
    token_ids_ptr += row * gamma
    draft_length = tl.minimum(tl.load(draft_lengths_ptr + row), gamma).to(tl.int32)
    temperature = tl.load(temperature_ptr + row)
    if VARIANT == "greedy":
        temperature = temperature * 0.0
    seed = tl.load(seeds_ptr + row)
    length = tl.load(lengths_ptr + row)
    scale = 1.0 / tl.maximum(temperature, MIN_HEAT) * LOG2E

    if item < n_summaries:
        _summarise(
            target_ptr,
            draft_ptr,
            maxima_ptr + row * n_summaries + item,
            sums_ptr + row * n_summaries + item,
            tops_ptr + row * n_summaries + item,
            item // n_tiles,
            (item % n_tiles) * steps * TILE,
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
            VARIANT,
            SKIP,
            LANES,
        )
        tl.debug_barrier()
        tl.atomic_add(state_ptr, tl.full([], 1, tl.int64), sem="release")
    else:
        _finish(
            target_ptr,
            draft_ptr,
            token_ids_ptr,
            maxima_ptr,
            sums_ptr,
            tops_ptr,
            state_ptr,
            num_accepted_ptr + row,
            next_token_ptr + row,
            failed_ptr + row,
            row,
            item - n_summaries,
            gamma,
            draft_length,
            temperature,
            scale,
            seed,
            length,
            vocab_size,
            target_stride_position,
            draft_stride_position,
            sequences,
            n_tiles,
            n_draws,
            draw_steps,
            VARIANT,
            HAS_DRAFT,
            POSITIONS,
            WIDTH,
        )


@triton.jit
def _assignment(batch_size, n_summaries, n_draws, lookahead):
    """This program's row and its piece of it: first the summaries of `lookahead` rows; then, row by row, the summaries
    of one and the draws of the row `lookahead` before; last the draws that remain."""
    program = tl.program_id(0)
    head = lookahead * n_summaries
    period = n_summaries + n_draws
    after = program - head
    tail = after - (batch_size - lookahead) * period
    row = program // n_summaries
    item = program % n_summaries
    if tail >= 0:
        row = batch_size - lookahead + tail // n_draws
        item = n_summaries + tail % n_draws
    elif after >= 0:
        item = after % period
        row = after // period + tl.where(item < n_summaries, lookahead, 0)
    return row, item


class Plan(NamedTuple):
    """How the work is cut: a summary takes steps * 4,096 tokens, a draw draw_steps * 1,024."""

    steps: int
    n_tiles: int
    draw_steps: int
    n_draws: int
    lookahead: int


def plan(batch_size: int, sequences: int, vocab_size: int, draws: bool, processors: int) -> Plan:
    """Long pieces, as they cost least a token, but at least PIECES of them for every multiprocessor."""
    tiles = batch_size * sequences * triton.cdiv(vocab_size, TILE.value)
    steps = min(max(tiles // (PIECES * processors), 1), MOST_STEPS)
    n_tiles = triton.cdiv(vocab_size, steps * TILE.value)
    draw_steps = min(max(batch_size * vocab_size // (processors * STEP), 1), MOST_STEPS)
    n_draws = triton.cdiv(vocab_size, draw_steps * STEP) if draws else 1
    lookahead = min(batch_size, triton.cdiv(RESIDENT * processors, sequences * n_tiles))
    return Plan(steps, n_tiles, draw_steps, n_draws, lookahead)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def verify_logits(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_lengths: Tensor,
    draft_weights: Tensor | None,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, positions, vocab_size = target_logits.shape
    gamma, device = positions - 1, target_logits.device
    num_accepted = torch.empty(batch_size, dtype=torch.int64, device=device)
    next_token, failed = torch.empty_like(num_accepted), torch.empty_like(num_accepted, dtype=torch.bool)
    if not batch_size:
        return num_accepted, next_token, failed
    has_draft = draft_weights is not None and gamma > 0 and variant == "rejection"
    sequences = positions + (gamma if has_draft else 0)
    cut = plan(batch_size, sequences, vocab_size, variant == "rejection", _processors(device))
    target = _rows_together(target_logits)
    draft = _rows_together(draft_weights) if has_draft and draft_weights is not None else target
    maxima = torch.empty(batch_size * sequences * cut.n_tiles, dtype=torch.float32, device=device)
    sums, tops = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    state = torch.empty(batch_size, 4, dtype=torch.int64, device=device)
    with torch.cuda.device_of(target):
        _reset_kernel[(1,)](state, 4 * batch_size, BLOCK=triton.next_power_of_2(4 * batch_size))
        _verify_kernel[(batch_size * (sequences * cut.n_tiles + cut.n_draws),)](
            target,
            draft,
            draft_token_ids.contiguous(),
            draft_lengths.contiguous(),
            seeds.contiguous(),
            lengths.contiguous(),
            temperature.contiguous(),
            maxima,
            sums,
            tops,
            state,
            num_accepted,
            next_token,
            failed,
            batch_size,
            gamma,
            vocab_size,
            target.stride(0),
            target.stride(1),
            draft.stride(0),
            draft.stride(1),
            cut.steps,
            cut.n_tiles,
            cut.n_draws,
            cut.draw_steps,
            cut.lookahead,
            VARIANT=variant,
            HAS_DRAFT=has_draft,
            SKIP=batch_size > 4,
            POSITIONS=triton.next_power_of_2(positions),
            WIDTH=max(min(triton.next_power_of_2(cut.n_tiles), 1024 // triton.next_power_of_2(positions)), 8),
            LANES=4096 // target.itemsize,
            num_warps=8,
        )
    return num_accepted, next_token, failed


def _rows_together(logits: Tensor) -> Tensor:
    return logits if logits.stride(2) == 1 else logits.contiguous()
