"""Gluon: matrix products of at most 16 tokens, whose weights go from memory straight into the operands' registers.

A program owns 16 outputs. Its warps walk the depth side by side in steps of 32 columns, and the 16 bytes of a row that
a thread loads are operands as they lie: the columns of a step are summed in an order of the matrix unit's own, the same
for weights and inputs. So the weights of the first steps wait in registers while the launch before this one ends, and
then nothing but the inputs has to be fetched.

Every sum is made in one order: a token's result has the same bits however many others share the call.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import functools
import warnings

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from flashspec.kernels.decoding import SAME_BITS, Ends
from flashspec.kernels.device import leave_l1, overlapped
from flashspec.kernels.tiling import DIRECT

ROWS, DEPTH, WARPS = DIRECT.rows, DIRECT.depth, DIRECT.warps
REGISTERS = 128  # a thread: two programs, one of which waits, fill a multiprocessor
MOST_BYTES = 96 << 20  # of weights: 67 MB are read 15 % faster than by the other kernel, 117 MB no faster
EARLY_BYTES = 8 << 20  # of weights, below which a launch is short against what surrounds it


@gluon.jit
def _wait():
    """Until the launch before this one is complete."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_next_begin():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch(
    at, inside, step: gl.constexpr, STEP: gl.constexpr, STEPS: gl.constexpr, EVEN: gl.constexpr, KEEP: gl.constexpr
):
    """A step's tile; zeros where the depth has ended. KEEP: it is read by others too."""
    whole: gl.constexpr = EVEN or step < STEPS - 1
    policy: gl.constexpr = "" if KEEP else "evict_first"
    if whole:
        return gl.load(at + step * STEP, eviction_policy=policy)
    else:  # noqa: RET505 - Triton decides at compile time between the two
        return gl.load(at + step * STEP, mask=inside, other=0, eviction_policy=policy)


@gluon.jit
def _half(lines, side: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, TOKENS] of [2 * ROWS, TOKENS]."""
    halves = gl.reshape(lines, [2, ROWS, lines.shape[1]])
    sides = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, halves.type.layout)))
    return gl.sum(gl.where((sides == side)[:, None, None], halves, 0.0), 0)


@gluon.jit(do_not_specialize=["M"])
def _direct_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    bias_ptr,
    squares_ptr,
    hidden_ptr,
    norm_ptr,
    weighted_ptr,
    parts_ptr,
    M,
    N,
    n_squares,
    eps,
    K: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    DEPTH: gl.constexpr,
    AHEAD: gl.constexpr,
    HELD: gl.constexpr,
    INPUTS_AHEAD: gl.constexpr,
    SQUARES: gl.constexpr,
    GATED: gl.constexpr,
    EARLY: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """As `schedule` says. EARLY: the next launch may begin at once, else when this one's first inputs are asked for.
    Then launches before this one may still run when the next begins: what that reads before its wait has to be older
    than the last launch that waits before it lets the next begin."""
    LINES: gl.constexpr = 2 * ROWS if GATED else ROWS  # of weights: a gate's and those that it lets through
    STEP: gl.constexpr = WARPS * DEPTH
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    LAST: gl.constexpr = K - (STEPS - 1) * STEP
    EVEN: gl.constexpr = LAST == STEP
    unit: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    # Eight columns a thread make operands of 64; of 32 the second half is the first again, which ptxas loads once.
    left: gl.constexpr = gl.DotOperandLayout(0, unit, 8)  # [WARPS, LINES, DEPTH]
    right: gl.constexpr = gl.DotOperandLayout(1, unit, 8)  # [WARPS, DEPTH, TOKENS]
    joined: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 16, 2], [1, 1, WARPS], [0, 1, 2])

    if OVERLAP and EARLY:
        _let_next_begin()
    line = gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    depth = gl.arange(0, DEPTH, gl.SliceLayout(0, gl.SliceLayout(1, left)))
    line_row = gl.minimum(gl.program_id(0) * ROWS + line % ROWS, N - 1) + line // ROWS * N
    column = warp[:, None, None] * DEPTH + depth[None, None, :]
    weight_at = weight_ptr + line_row.to(gl.int64)[None, :, None] * K + column
    inside = column + gl.zeros([WARPS, LINES, DEPTH], gl.int32, left) < LAST
    weights = ()
    for step in gl.static_range(HELD):
        weights = weights + (_fetch(weight_at, inside, step, STEP, STEPS, EVEN, False),)

    token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(1, right)))
    x_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, right)))
    x_depth = gl.arange(0, DEPTH, gl.SliceLayout(0, gl.SliceLayout(2, right)))
    x_column = x_warp[:, None, None] * DEPTH + x_depth[None, :, None]
    x_at = x_ptr + gl.minimum(token, M - 1)[None, None, :] * K + x_column
    x_inside = x_column + gl.zeros([WARPS, DEPTH, TOKENS], gl.int32, right) < LAST
    if OVERLAP:
        _wait()
    inputs = ()
    for step in gl.static_range(INPUTS_AHEAD):
        inputs = inputs + (_fetch(x_at, x_inside, step, STEP, STEPS, EVEN, True),)
    if OVERLAP and not EARLY:
        _let_next_begin()

    rows = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(0, joined)))
    tokens = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(0, joined)))
    in_rows, in_tokens = rows < N, tokens < M
    mask = in_rows[:, None] & in_tokens[None, :]
    places = tokens[None, :] * N.to(gl.int64) + rows[:, None]
    if SQUARES:
        summed: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
        part = gl.arange(0, SQUARES, gl.SliceLayout(0, summed))
        of_token = gl.arange(0, TOKENS, gl.SliceLayout(1, summed))
        kept = (of_token < M)[:, None] & (part < n_squares)[None, :]
        squares = gl.load(squares_ptr + of_token[:, None] * n_squares + part[None, :], mask=kept, other=0.0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(gl.float32)
    if hidden_ptr is not None:
        hidden = gl.load(hidden_ptr + places, mask=mask, other=0.0).to(gl.float32)
        norm = gl.load(norm_ptr + rows, mask=in_rows, other=0.0).to(gl.float32)

    for step in gl.static_range(HELD, AHEAD):
        weights = weights + (_fetch(weight_at, inside, step, STEP, STEPS, EVEN, False),)
    acc = gl.zeros([WARPS, LINES, TOKENS], gl.float32, unit)
    for step in gl.static_range(STEPS):
        acc = mma_v2(weights[step], inputs[step], acc)
        if step + AHEAD < STEPS:
            weights = weights + (_fetch(weight_at, inside, step + AHEAD, STEP, STEPS, EVEN, False),)
        if step + INPUTS_AHEAD < STEPS:
            inputs = inputs + (_fetch(x_at, x_inside, step + INPUTS_AHEAD, STEP, STEPS, EVEN, True),)

    out = gl.sum(gl.convert_layout(acc, joined), 0)  # [LINES, TOKENS]
    if SQUARES:
        scale = gl.rsqrt(gl.sum(squares, 1) / K + eps)
        out = out * gl.convert_layout(scale, gl.SliceLayout(0, out.type.layout))[None, :]
    if bias_ptr is not None:
        out = out + bias[:, None]
    if GATED:
        gate = _half(out, 0, ROWS)
        out = gate / (1.0 + gl.exp(-gate)) * _half(out, 1, ROWS)
        out = gl.convert_layout(out, gl.SliceLayout(0, joined))
    if hidden_ptr is not None:
        out = out + hidden
    rounded = out.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + places, rounded, mask=mask)
    if hidden_ptr is not None:
        new = gl.where(mask, rounded.to(gl.float32), 0.0)
        gl.store(weighted_ptr + places, (new * norm[:, None]).to(weighted_ptr.dtype.element_ty), mask=mask)
        part_at = tokens * gl.num_programs(0) + gl.program_id(0)
        gl.store(parts_ptr + part_at, gl.sum(new * new, 0), mask=in_tokens)


@functools.cache
def _usable(device: torch.device) -> bool:
    """Gluon is young: where it does not compile this, the other kernel serves."""
    if device.type != "cuda":
        return False
    x, weight = (torch.zeros(rows, 256, dtype=torch.bfloat16, device=device) for rows in (1, ROWS))
    try:
        launch(x, weight, x.new_empty(1, ROWS), Ends())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton's Gluon does not compile ({reason}): products are slower", RuntimeWarning, stacklevel=2)
        return False
    return True


def takes(weight: Tensor) -> bool:
    """Rows of 16 bits that 16-byte loads divide, of a matrix small enough for this kernel to be ahead."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and len(weight) > 2  # Triton takes one output for a constant
        and weight.shape[1] % 8 == 0
        and weight.nbytes < MOST_BYTES
        and _usable(weight.device)
    )


def schedule(weight: Tensor, tokens: int, gated: bool) -> dict[str, int]:
    """Constants of the kernel. AHEAD, INPUTS_AHEAD: steps whose weights and inputs are under way. HELD: of these, how
    many before the wait. Small products, and gates of few tokens, ask for all of it then and let the next launch begin
    at once. Of 20 schedules measured on an H200 for 13 products of 135M, 1B and 8B models, within 5 % of the best."""
    steps, few = triton.cdiv(weight.shape[1], WARPS * DEPTH), tokens <= 8
    early = weight.nbytes < EARLY_BYTES or (few and gated)
    ahead = min(4 if gated else 8, steps)
    return {
        "TOKENS": 8 if few else SAME_BITS,
        "ROWS": ROWS,
        "WARPS": WARPS,
        "DEPTH": DEPTH,
        "AHEAD": ahead,
        "HELD": ahead if early else triton.cdiv(ahead, 2),
        "INPUTS_AHEAD": min(8, steps) if few or steps <= 6 else 2,
        "GATED": gated,
        "EARLY": early,
    }


def launch(x: Tensor, weight: Tensor, out: Tensor, ends: Ends, gated: bool = False) -> None:
    (M, K), N = x.shape, out.shape[1]
    with torch.cuda.device_of(x):
        launched = _direct_kernel[(DIRECT.programs(N),)](
            x,
            weight,
            out,
            *ends.pointers(),
            M,
            N,
            ends.n_squares(),
            ends.eps,
            K=K,
            SQUARES=0 if ends.squares is None else triton.next_power_of_2(ends.n_squares()),
            num_warps=WARPS,
            maxnreg=REGISTERS,
            **schedule(weight, M, gated),
            **overlapped(x.device),
        )
        leave_l1(launched, x.device)
