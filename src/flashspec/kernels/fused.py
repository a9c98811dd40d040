"""Triton: raw logits to verdicts, one pass over the vocabulary and a second over one position a row.

Two launches. The first summarises tiles of every position's logits. In the second every program decides its row from
the summaries, and draws the next token from a slice of the one position that needs a draw; the program that comes last
writes it. The first launch zeroes what the second counts with, so a call leaves no state behind. Log-probabilities take
further sequences of the same launches: they are of the raw logits, which penalties and temperatures leave alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.core import Likelihoods
from flashspec.kernels.device import overlapped
from flashspec.kernels.draw import LOG2E, MIN_HEAT, STEP, _draw
from flashspec.kernels.noise import _random_words
from flashspec.kernels.reference_fused import ACCEPT
from flashspec.kernels.summary import TILE, _combine, _row_at, _summary_kernel

FOR_ACCEPT = tl.constexpr(ACCEPT)
PIECES, MOST_STEPS = 6, 8  # pieces a multiprocessor at the least, steps a piece at the most: 16 are no better
WARPS = 8
# Of more rows what no verdict needs is skipped, and the launches do not overlap: programs that wait take up room then
# (61.6 µs in place of 54.6 at B = 32, γ = 4, V = 128,256; 7.5 in place of 8.3 at B = 1).
FEW_ROWS = 4


@triton.jit
def _at(values, places, place):
    """The element of values [N] at places == place."""
    return tl.sum(tl.where(places == place, values, 0), 0)


@triton.jit
def _log_uniform(seed, position, POSITIONS: tl.constexpr):
    """Logarithms of the acceptance test's uniforms at positions [POSITIONS], rounded from float64 as in the twin."""
    words, _word1, _word2, _word3 = _random_words(
        seed, position, tl.full([], FOR_ACCEPT, tl.int32), tl.zeros([POSITIONS], tl.int32)
    )
    return tl.log((((words >> 8) | 1).to(tl.float32) * (1.0 / (1 << 24))).to(tl.float64)).to(tl.float32)


@triton.jit
def _given(rows, row, gamma, POSITIONS: tl.constexpr, VARIANT: tl.constexpr):
    """Of a row: its drafted tokens [POSITIONS], temperature, heat, scale, draft length, seed and length."""
    token_ids_ptr, draft_lengths_ptr, seeds_ptr, lengths_ptr, temperature_ptr, _floors_ptr = rows
    draft_length = tl.minimum(tl.load(draft_lengths_ptr + row), gamma).to(tl.int32)
    temperature = tl.load(temperature_ptr + row) if VARIANT != "greedy" else 0.0
    heat = tl.maximum(temperature, MIN_HEAT)
    scale = 1.0 / heat * LOG2E
    seed, length = tl.load(seeds_ptr + row), tl.load(lengths_ptr + row)
    position = tl.arange(0, POSITIONS)
    token = tl.load(token_ids_ptr + row * gamma + position, mask=position < gamma, other=-1)
    return token, temperature, heat, scale, draft_length, seed, length


@triton.jit
def _test(
    table,
    index,
    within,
    summary,
    given,
    draft,
    gamma,
    epsilon,
    delta,
    VARIANT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Whether the drafted tokens pass at a temperature, and the draft's maxima and sums (without a draft the target's):
    three times [POSITIONS].

    table: (pointer, elements a plane, tiles); summary: as from `_combine`; given: as from `_given`."""
    table_ptr, plane, n_tiles = table
    top, total, _best, moment = summary
    _token, temperature, heat, scale, draft_length, seed, length = given
    POSITIONS: tl.constexpr = within.shape[0]
    position = tl.arange(0, POSITIONS)
    draft_top, draft_total = top, total
    chosen = tl.load(table_ptr + 4 * plane + index, mask=within, other=0.0)
    if VARIANT == "typical":
        likely = tl.exp2((chosen - top) * scale) / total
        passes = likely > tl.minimum(delta * tl.exp2(moment / total - tl.log2(total)), epsilon)
    else:
        log_ratio = tl.div_rn(chosen, heat) - tl.div_rn(top, heat) - tl.log(total)
        if draft is not None:
            index += gamma + 1
            drafted = tl.load(table_ptr + 4 * plane + index, mask=within, other=0.0)
            wanted = position < tl.where(temperature == 0, 0, draft_length)
            draft_top, draft_total, _best, _moment = _combine(
                table_ptr, plane, index, wanted, n_tiles, LOG2E, VARIANT, WIDTH, CHUNKS
            )
            log_ratio -= drafted - draft_top - tl.log(draft_total)
        passes = _log_uniform(seed, length + position, POSITIONS) < log_ratio
    return passes, draft_top, draft_total


@triton.jit
def _settled(temperature, VARIANT: tl.constexpr):
    """Whether the next token is the best one, without a draw."""
    return (VARIANT == "coupled") | (VARIANT == "greedy") | (temperature == 0)


@triton.jit
def _weigh(
    raw,
    row,
    place,
    table,
    index,
    present,
    best,
    given,
    gamma,
    VARIANT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write the log-probabilities of what is settled by now, every position's logarithm of the sum of exponentials too.
    Returns what `_draw` takes. raw: as from `strided`, then where the two go; index: of its sequences in the table."""
    table_ptr, plane, n_tiles = table
    _logits_ptr, _row_stride, _stride, logprobs_ptr, log_totals_ptr = raw
    token, temperature, _heat, _scale, _draft_length, _seed, _length = given
    position = tl.arange(0, token.shape[0])
    top, total, _best, _moment = _combine(table_ptr, plane, index, present, n_tiles, LOG2E, "greedy", WIDTH, CHUNKS)
    log_totals = top + tl.log(total)
    entry = row * (gamma + 1) + position
    if tl.program_id(0) == 0:
        known = position < place + _settled(temperature, VARIANT).to(tl.int32)
        kept = tl.where(position < place, token, best)
        logit = tl.load(_row_at(raw, row, position) + kept, mask=known, other=0.0).to(tl.float32)
        tl.store(log_totals_ptr + entry, log_totals, mask=present)
        tl.store(logprobs_ptr + entry, logit - log_totals, mask=known)
    return _row_at(raw, row, place), _at(log_totals, position, place), logprobs_ptr + row * (gamma + 1) + place


@triton.jit
def _next_token(target, draft, floor, row, place, found, given, steps, vocab_size, ends, likely, VARIANT: tl.constexpr):
    """Write the token at the first place that did not pass: the best one, or one drawn together with other programs.

    found: (the target's summary, the draft's maxima and sums); given: as from `_given`."""
    summary, draft_summary = found
    top, total, best, _moment = summary
    draft_top, draft_total = draft_summary
    state_ptr, next_token_ptr = ends
    token, temperature, _heat, scale, draft_length, seed, length = given
    position = tl.arange(0, token.shape[0])
    draft_ptr = None
    if draft is not None:
        draft_ptr = _row_at(draft, row, place)
    if _settled(temperature, VARIANT):
        if tl.program_id(0) == 0:
            tl.store(next_token_ptr + row, _at(best, position, place).to(tl.int64))
    else:
        target_ptr = _row_at(target, row, place)
        highest, log2_total = _at(top, position, place), tl.log2(_at(total, position, place))
        _draw(
            (target_ptr, highest, scale, log2_total),
            floor,
            draft_ptr,
            (_at(draft_top, position, place), tl.log2(_at(draft_total, position, place)), _at(token, position, place)),
            place < (draft_length if VARIANT == "rejection" else 0),
            seed,
            length + place,
            steps,
            vocab_size,
            state_ptr + 2 * row,
            next_token_ptr + row,
            likely,
        )


@triton.jit(do_not_specialize=["gamma", "n_tiles", "steps", "epsilon", "delta"])
def _verdict_kernel(
    target,
    draft,
    raw,
    rows,
    table_ptr,
    state_ptr,
    results,
    gamma,
    vocab_size,
    n_tiles,
    steps,
    epsilon,
    delta,
    VARIANT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (slices of a draw, B). The rows were complete when the summary let this begin: only that is waited for."""
    item, row = tl.program_id(0), tl.program_id(1)
    num_accepted_ptr, next_token_ptr, failed_ptr = results
    sequences = (gamma + 1 if draft is None else 2 * gamma + 1) + (0 if raw is None else gamma + 1)
    plane = tl.num_programs(1) * sequences * n_tiles
    given = _given(rows, row, gamma, POSITIONS, VARIANT)
    token, temperature, _heat, scale, draft_length, _seed, _length = given
    position = tl.arange(0, POSITIONS)  # [POSITIONS]
    present, within, index = position <= draft_length, position < draft_length, row * sequences + position
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    summary = _combine(table_ptr, plane, index, present, n_tiles, scale, VARIANT, WIDTH, CHUNKS)
    top, total, best, _moment = summary
    finite = tl.abs(top) < float("inf")
    if VARIANT != "coupled":
        finite &= total == total
    passed = token == best
    draft_top, draft_total = top, total
    table = table_ptr, plane, n_tiles
    if (VARIANT == "rejection") | (VARIANT == "typical"):
        passes, draft_top, draft_total = _test(
            table, index, within, summary, given, draft, gamma, epsilon, delta, VARIANT, WIDTH, CHUNKS
        )
        passed = tl.where(temperature == 0, passed, passes)
    passed &= (token >= 0) & (token < vocab_size) & finite & within
    num_accepted = tl.min(tl.where(passed, POSITIONS, position), 0)
    if item == 0:
        tl.store(num_accepted_ptr + row, num_accepted.to(tl.int64))
        tl.store(failed_ptr + row, tl.max(((position <= num_accepted) & (finite == 0)).to(tl.int32), 0) != 0)
    floors_ptr = rows[5]
    floor = tl.load(floors_ptr + row * (gamma + 1) + num_accepted) if floors_ptr is not None else None
    likely = None
    if raw is not None:
        index += sequences - gamma - 1
        likely = _weigh(raw, row, num_accepted, table, index, present, best, given, gamma, VARIANT, WIDTH, CHUNKS)
    found, ends = (summary, (draft_top, draft_total)), (state_ptr, next_token_ptr)
    _next_token(target, draft, floor, row, num_accepted, found, given, steps, vocab_size, ends, likely, VARIANT)


class Plan(NamedTuple):
    """How the work is cut: a summary takes steps * TILE tokens (coupled: STEP), a draw draw_steps * STEP, by
    programs of draw_warps."""

    steps: int
    n_tiles: int
    draw_steps: int
    n_draws: int
    draw_warps: int


def plan(batch_size: int, sequences: int, vocab_size: int, variant: str, processors: int) -> Plan:
    """Draws of few rows wait beside the summary, so together they should be no more programs than run at once. Of many
    rows long pieces cost least a token, and short ones end together. Without a draw all have room."""
    size = STEP.value if variant == "coupled" else TILE.value
    tiles = batch_size * sequences * triton.cdiv(vocab_size, size)
    if variant in ("coupled", "greedy"):
        return Plan(*pieces(vocab_size, size, tiles // (PIECES * processors)), 1, 1, WARPS)
    draws = batch_size * triton.cdiv(vocab_size, STEP.value)
    if batch_size <= FEW_ROWS:
        steps = triton.cdiv(4 * tiles, 9 * processors)  # 2.25 programs a multiprocessor leave room for one of a draw
        draw_steps = triton.cdiv(draws, processors)
    else:
        steps, draw_steps = (_power_near_root(n / processors) for n in (tiles / 2, 2 * draws))
    steps, n_tiles = pieces(vocab_size, size, steps)
    draw_steps, n_draws = pieces(vocab_size, STEP.value, draw_steps)
    draw_warps = 4 if draw_steps == MOST_STEPS else WARPS  # fewer cost 1 µs at B = 1, win 6 at B = 32
    return Plan(steps, n_tiles, draw_steps, n_draws, draw_warps)


def _power_near_root(x: float) -> int:
    """The power of two next to the square root, at least 1."""
    return int(2 ** max(round(math.log2(x) / 2), 0))


def pieces(vocab_size: int, size: int, steps: int) -> tuple[int, int]:
    """(steps of `size` tokens a piece, pieces a sequence), as even as they can be with so many steps at the most."""
    n_steps = triton.cdiv(vocab_size, size)
    n_pieces = triton.cdiv(n_steps, min(max(steps, 1), MOST_STEPS))
    return triton.cdiv(n_steps, n_pieces), n_pieces


@functools.cache
def processors(device: torch.device) -> int:
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
    floors: Tensor | None = None,
    epsilon: float = 0.0,
    delta: float = 0.0,
    likelihoods: Likelihoods | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, positions, vocab_size = target_logits.shape
    gamma, device = positions - 1, target_logits.device
    num_accepted = torch.empty(batch_size, dtype=torch.int64, device=device)
    next_token, failed = torch.empty_like(num_accepted), torch.empty_like(num_accepted, dtype=torch.bool)
    if not batch_size:
        return num_accepted, next_token, failed
    draft = strided(draft_weights) if draft_weights is not None and gamma > 0 and variant == "rejection" else None
    sequences = positions + (0 if draft is None else gamma) + (0 if likelihoods is None else positions)
    cut = plan(batch_size, sequences, vocab_size, variant, processors(device))
    target = strided(target_logits)
    raw = None if likelihoods is None else (*strided(likelihoods.logits), likelihoods.tokens, likelihoods.totals)
    per_row = (draft_token_ids, draft_lengths, seeds, lengths, temperature, floors)
    rows = tuple(None if tensor is None else tensor.contiguous() for tensor in per_row)
    table = torch.empty((4 * cut.n_tiles + 1) * batch_size * sequences, dtype=torch.float32, device=device)
    state = torch.empty(batch_size, 2, dtype=torch.int64, device=device)
    height = triton.next_power_of_2(positions)
    width = min(triton.next_power_of_2(cut.n_tiles), max(2048 // height, 8))
    common = target, draft, raw, rows, table, state
    results = num_accepted, next_token, failed
    shape = {"POSITIONS": height, "WIDTH": width, "CHUNKS": triton.cdiv(cut.n_tiles, width)}
    lanes = WARPS * 512 // target_logits.element_size()  # loads of 16 bytes a thread
    few = batch_size <= FEW_ROWS
    options = {"VARIANT": variant} | (overlapped(target_logits.device) if few else {"OVERLAP": False})
    with torch.cuda.device_of(target_logits):
        _summary_kernel[(cut.n_tiles, sequences, batch_size)](
            *common, gamma, vocab_size, cut.steps, SKIP=not few, LANES=lanes, num_warps=WARPS, **options
        )
        steps = cut.n_tiles, cut.draw_steps
        _verdict_kernel[(cut.n_draws, batch_size)](
            *common, results, gamma, vocab_size, *steps, epsilon, delta, **shape, num_warps=cut.draw_warps, **options
        )
    return num_accepted, next_token, failed


def strided(logits: Tensor) -> tuple[Tensor, int, int]:
    """(B, Q, V) as a kernel takes it: tokens side by side, strides of row and position."""
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    return logits, logits.stride(0), logits.stride(1)
