"""Triton: Gumbel-max draws, the noise made where it is used."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from flashspec.kernels.noise import _gumbel, _random_words
from flashspec.kernels.reference_fused import COLDEST, RECOVER, TOKEN

NEVER = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
MIN_HEAT = tl.constexpr(COLDEST)
FOR_RECOVER, FOR_TOKEN = tl.constexpr(RECOVER), tl.constexpr(TOKEN)
STEP = 1024
GROUPS = tl.constexpr(STEP // 4)  # noise counters a step


@triton.jit
def _inverse_exponential(word):
    """1 / e for e = -log(1 - u), where u is `_gumbel`'s: its largest product with the weights is where log-weights
    plus Gumbel noise are largest, at two logarithms less a token."""
    u = word.to(tl.float32) * (1.0 / (1 << 32))
    u = tl.minimum(tl.maximum(u, 1.0 / (1 << 33)), 1.0 - 1.0 / (1 << 24))
    rest = 1.0 - u
    tiny = rest == 1.0
    return tl.where(tiny, 1.0, 1.0 - rest) / tl.where(tiny, u, -tl.log(rest) * u)


@triton.jit
def _noise_words(seed, position, purpose, start):
    """[4 * GROUPS] hashes for the tokens from `start`, a multiple of 4."""
    groups = start // 4 + tl.arange(0, GROUPS)
    word0, word1, word2, word3 = _random_words(seed, position, tl.full([], purpose, tl.int32), groups)
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def _coupled_tile(logits_ptr, seed, position, temperature, start, steps, vocab_size):
    """The largest logit plus noise of a tile and its token; +inf where a logit is NaN."""
    best = tl.full([4 * GROUPS], NEVER, tl.float32)
    place = tl.zeros([4 * GROUPS], tl.int32) + start
    heat = tl.maximum(temperature, MIN_HEAT)
    for step in range(steps * 4):  # a summary's step is 4,096 tokens
        token = start + step * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
        logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        score = logits
        if temperature != 0:
            score = tl.div_rn(logits, heat) + _gumbel(
                _noise_words(seed, position, FOR_TOKEN, start + step * (4 * GROUPS))
            )
        score = tl.where(logits == logits, score, float("inf"))
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, token, place)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, place, vocab_size - 1), 0)


@triton.jit
def _draw(
    target_ptr,
    draft_ptr,
    next_token_ptr,
    state_ptr,
    top,
    log2_total,
    scale,
    draft_top,
    draft_log2_total,
    draft_token,
    rejected,
    seed,
    position,
    first_step,
    draw_steps,
    n_draws,
    vocab_size,
    HAS_DRAFT: tl.constexpr,
):
    """One slice of the draw from max(0, p - q), or from p where that is empty or nothing was rejected. The program
    that comes last writes the token. state: summaries done, draws done, best of the residual, best of p."""
    start = first_step * (4 * GROUPS)
    draft_size = tl.where(rejected, vocab_size, 0)
    best_excess = tl.zeros([4 * GROUPS], tl.float32)
    best_target = tl.zeros([4 * GROUPS], tl.float32)
    excess_place = tl.zeros([4 * GROUPS], tl.int32) + start
    target_place = tl.zeros([4 * GROUPS], tl.int32) + start
    for step in range(draw_steps):
        first = start + step * (4 * GROUPS)
        token = first + tl.arange(0, 4 * GROUPS)
        logits = tl.load(target_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        if HAS_DRAFT:
            draft = tl.load(draft_ptr + token, mask=token < draft_size, other=NEVER).to(tl.float32)
            draft_probs = tl.exp2((draft - draft_top) * LOG2E - draft_log2_total)
        else:
            draft_probs = tl.where(rejected & (token == draft_token), 1.0, 0.0)
        inverse = _inverse_exponential(_noise_words(seed, position, FOR_RECOVER, first))
        target_probs = tl.exp2((logits - top) * scale - log2_total)
        score = target_probs * inverse
        better = score > best_target
        best_target = tl.where(better, score, best_target)
        target_place = tl.where(better, token, target_place)
        score = tl.where(target_probs > draft_probs, (target_probs - draft_probs) * inverse, 0.0)  # NaN drafts: p
        better = score > best_excess
        best_excess = tl.where(better, score, best_excess)
        excess_place = tl.where(better, token, excess_place)
    tl.atomic_max(state_ptr + 2, _key(best_excess, excess_place), sem="relaxed")
    tl.atomic_max(state_ptr + 3, _key(best_target, target_place), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, tl.full([], 1, tl.int64), sem="acq_rel") == n_draws - 1:
        nothing = tl.full([], 0, tl.int64)
        key = tl.atomic_max(state_ptr + 2, nothing, sem="relaxed")
        if (key >> 32) == 0:
            key = tl.atomic_max(state_ptr + 3, nothing, sem="relaxed")
        tl.store(next_token_ptr, 0x7FFFFFFF - (key & 0x7FFFFFFF))


@triton.jit
def _key(scores, places):
    """Score and place of the best as one integer: scores are not negative, and ties go to the lowest token."""
    best = tl.max(scores, 0)
    place = tl.min(tl.where(scores == best, places, 0x7FFFFFFF), 0)
    return (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
