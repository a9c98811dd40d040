"""Triton: draws from categorical distributions, the noise made where it is used."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from flashspec.kernels.noise import _gumbel, _random_words
from flashspec.kernels.reference_fused import COLDEST, RECOVER

NEVER = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
MIN_HEAT = tl.constexpr(COLDEST)
FOR_RECOVER = tl.constexpr(RECOVER)
LARGEST = tl.constexpr(0x7FFFFFFF)
STEP = tl.constexpr(1024)  # tokens a step of a race
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _noise_words(seed, position, purpose, start):
    """[STEP] hashes for the tokens from `start`, a multiple of 4."""
    groups = start // 4 + tl.arange(0, STEP // 4)
    word0, word1, word2, word3 = _random_words(seed, position, tl.full([], purpose, tl.int32), groups)
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def _first(values, places, best):
    """The lowest of places [N] where values [N] are best."""
    return tl.min(tl.where(values == best, places, LARGEST), 0)


@triton.jit
def _arrival(word):
    """-log(1 - u), where u is `_gumbel`'s: the smallest ratio to the probabilities is where log-probabilities plus
    Gumbel noise are largest."""
    u = word.to(tl.float32) * (1.0 / (1 << 32))
    u = tl.minimum(tl.maximum(u, 1.0 / (1 << 33)), 1.0 - 1.0 / (1 << 24))
    rest = 1.0 - u
    kept = 1.0 - rest  # what of u is left in 1 - u
    return tl.where(kept == 0.0, u, -tl.log(rest) * (u / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def _rough_log2(value):
    """Within 2^-22: one instruction, where `tl.log2` takes twenty."""
    return tl.log2(value) if INTERPRETED else libdevice.fast_log2f(value)


@triton.jit
def _rough_arrival(word):
    """The same within 1e-4, at a fifth of the instructions."""
    u = word.to(tl.float32) * (1.0 / (1 << 32))
    rest = tl.maximum(1.0 - u, 1.0 / (1 << 24))
    return tl.where(u < 1.0 / 256, u + 0.5 * u * u, _rough_log2(rest) * (-1.0 / LOG2E)) + 1.0 / (1 << 33)


@triton.jit
def _gumbel_race(
    logits_ptr, bias_ptr, weights_ptr, floor, temperature, seed, position, purpose, start, steps, vocab_size
):
    """The first token with the largest logit / temperature + noise of steps * STEP tokens, that sum (+inf where a logit
    is NaN), and the largest logit. Noise is left out at temperature 0. bias_ptr, weights_ptr, floor: None, or what is
    added to the logits, where logits / temperature go, and below which a logit is out. Leaders as in `_race`."""
    best = tl.full([STEP], NEVER, tl.float32)
    top, leader = best, best
    leader_word = tl.zeros([STEP], tl.uint32)
    place = tl.zeros([STEP], tl.int32) + start
    heat = tl.maximum(temperature, MIN_HEAT)
    for step in range(steps):
        first = start + step * STEP
        token = first + tl.arange(0, STEP)
        within = token < vocab_size
        logits = tl.load(logits_ptr + token, mask=within, other=NEVER).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + token, mask=within, other=0.0)
        strange = logits != logits
        if floor is not None:
            logits = tl.where(logits < floor, NEVER, logits)
        if weights_ptr is not None:
            tl.store(weights_ptr + token, tl.div_rn(logits, heat), mask=within)
        score = logits
        words = tl.zeros([STEP], tl.uint32)
        if temperature != 0:
            words = _noise_words(seed, position, purpose, first)
            score = logits * (1.0 / heat) - _rough_log2(_rough_arrival(words)) * (1.0 / LOG2E)
        score = tl.where(strange, float("inf"), score)
        top = tl.maximum(top, tl.where(strange, float("inf"), logits))
        better = score > best
        best = tl.where(better, score, best)
        leader = tl.where(better, logits, leader)
        leader_word = tl.where(better, words, leader_word)
        place = tl.where(better, token, place)
    if temperature != 0:
        best = tl.where(best < float("inf"), tl.div_rn(leader, heat) + _gumbel(leader_word), best)
    highest = tl.max(best, 0)
    return tl.minimum(_first(best, place, highest), vocab_size - 1), highest, tl.max(top, 0)


@triton.jit
def _race(target, floor, draft_ptr, draft, rejected, seed, position, start, steps, vocab_size):
    """The winner of steps * STEP tokens in the race of max(0, p - q) after a rejection, of p otherwise, as one
    integer: score, then the token counted from the end, so that ties go to the lowest. A score of 0: nobody ran.

    target: (pointer, largest logit, scale, log2 of the sum); draft: (largest logit, log2 of the sum, token); floor,
    draft_ptr: None or as they are called; without draft_ptr q is 1 at draft's token.
    A lane's own leader is found by rough arrivals, and only leaders race exactly: two of one lane are
    within 1e-4 of each other in a draw out of a million, and it is the runner-up that is then drawn."""
    target_ptr, top, scale, log2_total = target
    draft_top, draft_log2_total, draft_token = draft
    leader = tl.zeros([STEP], tl.float32)
    late = leader + 1.0
    drafts = tl.where(rejected, vocab_size, 0)  # tokens with a q
    one_hot = tl.where(rejected, draft_token, -1)
    leader_word = tl.zeros([STEP], tl.uint32)
    place = tl.zeros([STEP], tl.int32) + start
    for step in range(steps):
        first = start + step * STEP
        token = first + tl.arange(0, STEP)
        logits = tl.load(target_ptr + token, mask=token < vocab_size, other=NEVER).to(tl.float32)
        weights = tl.exp2((logits - top) * scale - log2_total)
        if floor is not None:
            weights = tl.where(logits < floor, 0.0, weights)
        if draft_ptr is not None:
            drafted = tl.load(draft_ptr + token, mask=token < drafts, other=NEVER).to(tl.float32)
            drafted = tl.exp2((drafted - draft_top) * LOG2E - draft_log2_total)
            drafted = tl.where(drafted == drafted, drafted, 0.0)  # a draft that is not finite: p
        else:
            drafted = tl.where(token == one_hot, 1.0, 0.0)
        weights = tl.maximum(weights - drafted, 0.0)
        words = _noise_words(seed, position, FOR_RECOVER, first)
        arrival = _rough_arrival(words)
        better = weights * late > leader * arrival
        leader = tl.where(better, weights, leader)
        late = tl.where(better, arrival, late)
        leader_word = tl.where(better, words, leader_word)
        place = tl.where(better, token, place)
    scores = leader / _arrival(leader_word)
    best = tl.max(scores, 0)
    return (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - _first(scores, place, best)).to(
        tl.int64
    )


@triton.jit
def _draw(
    target, floor, draft_ptr, draft, rejected, seed, position, steps, vocab_size, state_ptr, next_token_ptr, likely
):
    """This program's slice of a row's race; the program that comes last writes the token. state: best so far, how many
    have come. likely: None, or pointer to the raw logits, the logarithm of their sum of exponentials, and where the
    token's log-probability goes."""
    start = tl.program_id(0) * steps * STEP
    key = _race(target, floor, draft_ptr, draft, rejected, seed, position, start, steps, vocab_size)
    tl.atomic_max(state_ptr, key, sem="relaxed")
    if tl.atomic_add(state_ptr + 1, tl.full([], 1, tl.int64), sem="acq_rel") == tl.num_programs(0) - 1:
        key = tl.atomic_max(state_ptr, tl.full([], 0, tl.int64), sem="relaxed")
        if (key >> 32) == 0:  # p = q up to rounding: a rejection that exact arithmetic cannot have
            all_steps = tl.cdiv(vocab_size, STEP)
            key = _race(target, floor, None, (0.0, 0.0, -1), rejected, seed, position, 0, all_steps, vocab_size)
        token = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        tl.store(next_token_ptr, token)
        if likely is not None:
            raw_ptr, log_total, logprob_ptr = likely
            tl.store(logprob_ptr, tl.load(raw_ptr + token).to(tl.float32) - log_total)
