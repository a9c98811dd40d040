"""Triton: prompt lookup. One program a row reads its text from the end until it has the longest match."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, LONG = 4096, 16_384  # tokens at a time; twice as many of long texts


@triton.jit(do_not_specialize=["size", "length", "min_ngram"])
def _look_up_kernel(
    tokens_ptr,
    lengths_ptr,
    token_ids_ptr,
    draft_lengths_ptr,
    stride,
    size,
    length,
    min_ngram,
    MAX_NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    text_ptr = tokens_ptr + row.to(tl.int64) * stride
    text_length = tl.minimum(tl.load(lengths_ptr + row), size).to(tl.int32)
    start = (text_length - 2) // BLOCK * BLOCK  # a match may end before the last token
    best = tl.full([], 0, tl.int64)  # matched tokens, then the place of the last of them
    while (start >= 0) & (best < (MAX_NGRAM << 32)):
        end = start + tl.arange(0, BLOCK)  # [BLOCK]
        matches = end < text_length - 1
        last = tl.load(text_ptr + text_length - 1)
        matches &= tl.load(text_ptr + end, mask=matches, other=-1) == last
        if tl.max(matches.to(tl.int32), 0) != 0:  # most of a text is not looked at twice
            matched = matches.to(tl.int64)
            for back in tl.static_range(1, MAX_NGRAM):
                matches &= end >= back
                last = tl.load(text_ptr + text_length - 1 - back, mask=text_length > back, other=-1)
                matches &= tl.load(text_ptr + end - back, mask=matches, other=-2) == last
                matched += matches.to(tl.int64)
            best = tl.maximum(best, tl.max(tl.where(matched > 0, (matched << 32) | end, 0), 0))
        start -= BLOCK
    found = (best >> 32) >= min_ngram
    after = (best & 0x7FFFFFFF).to(tl.int32) + 1
    offset = tl.arange(0, WIDTH)  # [WIDTH]
    place = after + offset % tl.maximum(text_length - after, 1)
    token = tl.load(text_ptr + place, mask=offset < tl.where(found, length, 0), other=0)
    tl.store(token_ids_ptr + row * length + offset, token, mask=offset < length)
    tl.store(draft_lengths_ptr + row, tl.where(found, length, 0).to(tl.int64))


def look_up(
    tokens: Tensor, lengths: Tensor, bound: int, length: int, max_ngram: int, min_ngram: int
) -> tuple[Tensor, Tensor]:
    batch_size, size = tokens.shape
    token_ids = torch.empty(batch_size, length, dtype=torch.int64, device=tokens.device)
    draft_lengths = torch.empty(batch_size, dtype=torch.int64, device=tokens.device)
    if batch_size:
        with torch.cuda.device_of(tokens):
            _look_up_kernel[(batch_size,)](
                tokens,
                lengths.contiguous(),
                token_ids,
                draft_lengths,
                tokens.stride(0),
                size,
                length,
                min_ngram,
                MAX_NGRAM=max_ngram,
                BLOCK=BLOCK if size <= LONG else 2 * BLOCK,
                WIDTH=triton.next_power_of_2(length),
                num_warps=16,
            )
    return token_ids, draft_lengths
