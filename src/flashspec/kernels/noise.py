"""Triton: counter-based random numbers. Counter words: token // 4, position low, purpose, position high."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIFORM_BLOCK = 128
GUMBEL_BLOCK = 256  # counters, so 1,024 tokens a program


@triton.jit
def _random_words(seed, position, purpose, group):
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), low, purpose.to(tl.uint32), high)


@triton.jit(do_not_specialize=["purpose"])
def _uniform_kernel(seeds_ptr, positions_ptr, out_ptr, purpose, n_positions, n_total, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = index < n_total
    seed = tl.load(seeds_ptr + index // n_positions, mask=mask, other=0)
    position = tl.load(positions_ptr + index, mask=mask, other=0)
    word, _, _, _ = _random_words(seed, position, purpose, tl.zeros([BLOCK], tl.uint32))
    tl.store(out_ptr + index, ((word >> 8) | 1).to(tl.float32) * (1.0 / (1 << 24)), mask=mask)


@triton.jit
def _gumbel(word):
    u = word.to(tl.float32) * (1.0 / (1 << 32))
    u = tl.minimum(tl.maximum(u, 1.0 / (1 << 33)), 1.0 - 1.0 / (1 << 24))
    # log1p(-u) without a library call: the quotient cancels the rounding of 1 - u
    rest = 1.0 - u
    log1p = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-log1p)


@triton.jit(do_not_specialize=["purpose"])
def _gumbel_kernel(seeds_ptr, positions_ptr, out_ptr, purpose, n_positions, vocab_size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds_ptr + index // n_positions)
    position = tl.load(positions_ptr + index)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    word0, word1, word2, word3 = _random_words(seed, position, purpose, group)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))  # [4 * BLOCK]
    token = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + index * vocab_size + token, _gumbel(words), mask=token < vocab_size)


def philox_uniform(seeds: Tensor, positions: Tensor, purpose: int) -> Tensor:
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    if out.numel():
        with torch.cuda.device_of(out):
            _uniform_kernel[(triton.cdiv(out.numel(), UNIFORM_BLOCK),)](
                seeds.contiguous(),
                positions.contiguous(),
                out,
                purpose,
                positions.shape[1],
                out.numel(),
                BLOCK=UNIFORM_BLOCK,
            )
    return out


def philox_gumbel(seeds: Tensor, positions: Tensor, purpose: int, vocab_size: int) -> Tensor:
    out = torch.empty(*positions.shape, vocab_size, dtype=torch.float32, device=positions.device)
    if out.numel():
        with torch.cuda.device_of(out):
            _gumbel_kernel[(positions.numel(), triton.cdiv(vocab_size, 4 * GUMBEL_BLOCK))](
                seeds.contiguous(),
                positions.contiguous(),
                out,
                purpose,
                positions.shape[1],
                vocab_size,
                BLOCK=GUMBEL_BLOCK,
            )
    return out
