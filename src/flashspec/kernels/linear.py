"""Triton: matrix products with few tokens, which cost what reading the weights costs.

A program owns `rows` outputs of every token and walks the depth in one fixed order, tokens padded to a tile: a token's
result has the same bits however many others share the call. The weight tile is the left operand, so that the number of
tokens never changes which matrix instruction is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashspec.kernels import direct, elementwise
from flashspec.kernels.decoding import Ends, InBytes, Weight, values_of
from flashspec.kernels.device import overlapped, shared_memory
from flashspec.kernels.tiling import DIRECT, IN_NO_CACHE, MEASURED, Tiling, choose, tiling_of

ASKED = 32 << 10  # bytes of weights a program asks into L2 before its predecessor is done
# Bytes of weights from which on the next launch waits for the last loads: 8B steps - 3 %, 135M steps would be + 20 %.
LATE_BYTES = 32 << 20
MOST_COPIES = 64  # of a weight: a few hundred launches a measurement
LEAST_COLUMNS, MOST_COLUMNS = 16, 128  # of a matrix instruction, of what registers hold


@triton.jit
def ask_ahead(start_ptr, piece):
    """Ask `piece` bytes (a multiple of 16) into L2 from each address; best with as many addresses as threads."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [start_ptr.to(tl.int64), tl.zeros(start_ptr.shape, tl.int32) + piece],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ask_weights(weight_ptr, up_ptr, line_at, piece, PIECES: tl.constexpr, GATED: tl.constexpr):
    """Ask for the first PIECES pieces of every line, and of its twin in the second half."""
    width = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    piece_at = line_at[:, None] + tl.arange(0, PIECES)[None, :] * (piece // width)
    ask_ahead(weight_ptr + piece_at, piece)
    if GATED:
        ask_ahead(up_ptr + piece_at, piece)


@triton.jit
def _weights(weight_ptr, inside, EVEN: tl.constexpr):
    """A tile [rows, DEPTH], zeros where the depth has ended."""
    return tl.load(weight_ptr) if EVEN else tl.load(weight_ptr, mask=inside[None, :], other=0)


@triton.jit
def _join(acc, ROWS: tl.constexpr, TOKENS: tl.constexpr, STRANDS: tl.constexpr):
    """The sum of the blocks on the diagonal, [ROWS, TOKENS]."""
    line, column = tl.arange(0, ROWS * STRANDS), tl.arange(0, TOKENS * STRANDS)
    acc = tl.where((line // ROWS)[:, None] == (column // TOKENS)[None, :], acc, 0)
    acc = tl.sum(tl.reshape(acc, [ROWS * STRANDS, STRANDS, TOKENS]), 1)
    return tl.sum(tl.reshape(acc, [STRANDS, ROWS, TOKENS]), 0)


@triton.jit
def _products(
    x_ptr,
    weight_ptr,
    line_at,
    sizes,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STRANDS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
):
    """This program's rows times the tokens, and if GATED its rows of the second half too, where strands meet their own
    inputs and where they do not: [ROWS * STRANDS, TOKENS * STRANDS] each, float32, of bytes int32.

    line_at: [ROWS * STRANDS], where a row's strand begins; sizes: (M, N, K, strand length)"""
    M, N, K, strand_length = sizes
    column, depth = tl.arange(0, TOKENS * STRANDS), tl.arange(0, DEPTH)
    weight_at = line_at[:, None] + depth[None, :]  # [ROWS * STRANDS, DEPTH]
    x_at = (column % TOKENS * K + column // TOKENS * strand_length)[None, :] + depth[:, None]  # [DEPTH, columns]
    in_columns = (column % TOKENS < M)[None, :]
    up_ptr = weight_ptr + N.to(tl.int64) * K
    sum_type: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([ROWS * STRANDS, TOKENS * STRANDS], sum_type)
    acc_up = tl.zeros([ROWS * STRANDS, TOKENS * STRANDS], sum_type)
    for start in range(0, strand_length, DEPTH):
        inside = start + depth < strand_length
        x = tl.load(x_ptr + x_at + start, mask=in_columns if EVEN else in_columns & inside[:, None], other=0)
        tile = _weights(weight_ptr + weight_at + start, inside, EVEN)
        acc = tl.dot(tile, x, acc, input_precision="ieee", out_dtype=sum_type)
        if GATED:
            tile = _weights(up_ptr + weight_at + start, inside, EVEN)
            acc_up = tl.dot(tile, x, acc_up, input_precision="ieee", out_dtype=sum_type)
    return acc, acc_up


@triton.jit
def _of_bytes(acc, scales, token_scales, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Float32 [ROWS, TOKENS] of int32 [ROWS, 2 * TOKENS], where a token has a column of high bytes and one of low."""
    high, low = tl.split(tl.reshape(acc, [ROWS, TOKENS, 2]))
    return (high.to(tl.float32) * 256 + low.to(tl.float32)) * scales[:, None] * token_scales[None, :]


@triton.jit
def _squares(squares_ptr, tokens, in_tokens, n_squares, SQUARES: tl.constexpr):
    """Parts of the tokens' sums of squares: [TOKENS, SQUARES]."""
    part = tl.arange(0, SQUARES)
    kept = in_tokens[:, None] & (part < n_squares)[None, :]
    return tl.load(squares_ptr + tokens[:, None] * n_squares + part[None, :], mask=kept, other=0.0)


@triton.jit(do_not_specialize=["M", "piece"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    token_scales_ptr,
    out_ptr,
    bias_ptr,
    squares_ptr,
    hidden_ptr,
    norm_ptr,
    weighted_ptr,
    parts_ptr,
    M,
    N,
    K,
    strand_length,
    n_squares,
    piece,
    eps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STRANDS: tl.constexpr,
    DEPTH: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,
    SQUARES: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
    LATE: tl.constexpr,
):
    rows, tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    in_rows, in_tokens = rows < N, tokens < M
    mask = in_rows[:, None] & in_tokens[None, :]
    places = tokens[None, :] * N.to(tl.int64) + rows[:, None]
    # Strands are pieces of the depth that are walked side by side. Their weights are stacked as further rows, their
    # inputs as further columns; the blocks of the product where both are of one strand are what is wanted.
    line = tl.arange(0, ROWS * STRANDS)
    line_row = tl.minimum(tl.program_id(0) * ROWS + line % ROWS, N - 1).to(tl.int64)
    line_at = line_row * K + line // ROWS * strand_length
    if OVERLAP:
        up_ptr = weight_ptr + N.to(tl.int64) * K
        _ask_weights(weight_ptr, up_ptr, line_at, piece, THREADS // (ROWS * STRANDS), GATED)
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()

    # What the end needs is under way while the depth is walked. Converted here, it would be waited for here.
    SQUARES_AHEAD: tl.constexpr = SQUARES * TOKENS <= 4096  # for more there are too few registers
    if SQUARES and SQUARES_AHEAD:
        squares = _squares(squares_ptr, tokens, in_tokens, n_squares, SQUARES)
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + rows, mask=in_rows, other=0.0)
        token_scales = tl.load(token_scales_ptr + tokens, mask=in_tokens, other=0.0)
        if GATED:
            up_scales = tl.load(scales_ptr + N + rows, mask=in_rows, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=in_rows, other=0.0)
    if hidden_ptr is not None:
        hidden = tl.load(hidden_ptr + places, mask=mask, other=0.0)
        norm = tl.load(norm_ptr + rows, mask=in_rows, other=0.0)
    sides: tl.constexpr = 1 if scales_ptr is None else 2
    sizes = sides * M, N, K, strand_length
    acc, acc_up = _products(x_ptr, weight_ptr, line_at, sizes, sides * TOKENS, ROWS, STRANDS, DEPTH, EVEN, GATED)
    if OVERLAP and LATE:
        gdc_launch_dependents()
    if STRANDS > 1:
        acc = _join(acc, ROWS, sides * TOKENS, STRANDS)
        if GATED:
            acc_up = _join(acc_up, ROWS, sides * TOKENS, STRANDS)
    if scales_ptr is not None:
        acc = _of_bytes(acc, scales, token_scales, ROWS, TOKENS)
        if GATED:
            acc_up = _of_bytes(acc_up, up_scales, token_scales, ROWS, TOKENS)
    if SQUARES:
        if not SQUARES_AHEAD:
            squares = _squares(squares_ptr, tokens, in_tokens, n_squares, SQUARES)
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
        acc = acc * scale
        if GATED:
            acc_up = acc_up * scale
    if bias_ptr is not None:
        acc += bias.to(tl.float32)[:, None]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if hidden_ptr is not None:
        acc += hidden.to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, out, mask=mask)
    if hidden_ptr is not None:
        new = tl.where(mask, out.to(tl.float32), 0.0)
        tl.store(
            weighted_ptr + places, (new * norm.to(tl.float32)[:, None]).to(weighted_ptr.dtype.element_ty), mask=mask
        )
        tl.store(parts_ptr + tokens * tl.num_programs(0) + tl.program_id(0), tl.sum(new * new, 0), mask=in_tokens)


def project(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(x.shape[0], len(values_of(weight)), dtype=dtype, device=x.device)
    _launch(x, weight, out, Ends(bias, squares, eps=eps), tiling_of(values_of(weight), tokens=len(x)))
    return out


def project_gated(x: Tensor, weight: Weight, squares: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape[0], len(values_of(weight)) // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, out, Ends(squares=squares, eps=eps), tiling_of(values_of(weight), True, len(x)), gated=True)
    return out


def project_add(
    x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out, weighted = torch.empty_like(hidden), torch.empty_like(hidden)
    tiling = tiling_of(values_of(weight), tokens=len(x))
    parts = torch.empty(len(x), tiling.programs(hidden.shape[1]), dtype=torch.float32, device=x.device)
    _launch(x, weight, out, Ends(bias, None, hidden, norm, weighted, parts), tiling)
    return out, weighted, parts


def n_parts(weight: Weight, tokens: int) -> int:
    """Into how many the squares of `project_add` are summed."""
    values = values_of(weight)
    return tiling_of(values, tokens=tokens).programs(len(values))


def tune(weight: Weight, keep: bool = True) -> None:
    """Choose a weight's tiling by measurement, of nothing but its products, and of copies that no cache holds. keep: as
    for `choose`."""
    values = values_of(weight)
    dtype = values.dtype if values.is_floating_point() else torch.bfloat16
    x = torch.randn(max(MEASURED), values.shape[1], dtype=dtype, device=values.device)
    out = torch.empty(max(MEASURED), len(values), dtype=dtype, device=values.device)
    copies = [weight]

    def run() -> None:
        while len(copies) < min(-(-IN_NO_CACHE // values.nbytes), MOST_COPIES):
            copies.append(weight._replace(values=values.clone()) if isinstance(weight, InBytes) else values.clone())
        for tokens in MEASURED:
            tiling = tiling_of(values, tokens=tokens)
            for each in copies:
                _launch(x[:tokens], each, out[:tokens], Ends(), tiling)

    choose([(values, False)], run, keep)


def _operands(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Inputs and weights as the matrix units take them, and of bytes the scales of rows and of tokens."""
    if not isinstance(weight, InBytes):
        return x, weight, None, None
    found, token_scales = elementwise.round_to_bytes(x, weight.columns)
    return found, weight.values, weight.scales, token_scales


def _launch(x: Tensor, weight: Weight, out: Tensor, ends: Ends, tiling: Tiling, gated: bool = False) -> None:
    M, K = x.shape
    N = out.shape[1]
    x, values, scales, token_scales = _operands(x, weight)
    sides = 1 if scales is None else 2
    if tiling == DIRECT:
        direct.launch(x, values, out, ends, gated)
        return
    tokens = max(triton.next_power_of_2(M), LEAST_COLUMNS // sides)
    strands = tiling.strands if K % (16 * tiling.strands) == 0 else 1
    while sides * tokens * strands > MOST_COLUMNS:
        strands //= 2
    lines, columns = tiling.rows * strands, sides * tokens * strands
    stage_bytes = (lines * (2 if gated else 1) + columns) * tiling.depth * values.itemsize
    threads = 32 * tiling.warps
    ahead = min(ASKED // threads // (2 if gated else 1), K // strands * values.itemsize * lines // threads)
    with torch.cuda.device_of(x):
        _linear_kernel[(tiling.programs(N),)](
            x,
            values,
            scales,
            token_scales,
            out,
            *ends.pointers(),
            M,
            N,
            K,
            K // strands,
            ends.n_squares(),
            ahead // 16 * 16,
            ends.eps,
            TOKENS=tokens,
            ROWS=tiling.rows,
            DEPTH=tiling.depth,
            STRANDS=strands,
            THREADS=threads,
            EVEN=K // strands % tiling.depth == 0,
            SQUARES=0 if ends.squares is None else triton.next_power_of_2(ends.n_squares()),
            GATED=gated,
            LATE=values.nbytes >= LATE_BYTES,
            num_warps=tiling.warps,
            num_stages=max(min(tiling.stages, shared_memory(x.device) // stage_bytes), 1),
            **overlapped(x.device),
        )
