"""Which cut of a verification is fastest: python benchmarks/sweep_verify.py OUTPUT [ROWS ...].

For every size of `flashspec bench kernels` with so many rows (8 and 32 unless given): how long `kernels.fused` takes as
it cuts the work, and with other pieces of the summary and of the draw."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from flashspec.bench.cases import Grid, Verification, verification_inputs, verification_names
from flashspec.bench.provenance import provenance
from flashspec.bench.timing import Timer, make_timer
from flashspec.kernels import fused, verify_logits

STEPS, DRAW_STEPS, DRAW_WARPS = (1, 2, 4, 8), (1, 2, 4, 8), (4, 8)
REPLAYS, CALLS = 15, 20


def cuts(vocab_size: int) -> list[fused.Plan]:
    """All that differ for a vocabulary."""
    found = {}
    for steps, draw_steps, warps in itertools.product(STEPS, DRAW_STEPS, DRAW_WARPS):
        n_tiles = -(-vocab_size // (steps * fused.TILE.value))
        n_draws = -(-vocab_size // (draw_steps * fused.STEP.value))
        found.setdefault((n_tiles, n_draws, warps), fused.Plan(steps, n_tiles, draw_steps, n_draws, warps))
    return list(found.values())


def measure(inputs: Verification, cut: fused.Plan, timer: Timer) -> float:
    usual = fused.plan
    fused.plan = lambda *_: cut
    try:
        return timer(lambda _: verify_logits(*inputs, variant="rejection"))[0]
    finally:
        fused.plan = usual


def sweep(grid: Grid, timer: Timer) -> list[dict[str, Any]]:
    rows = []
    processors = fused.processors(torch.device(grid.device))
    for shape, dtype in grid.verifications():
        inputs = verification_inputs(shape, dtype, grid.device, 0)
        batch_size, gamma, vocab_size = shape
        ours = fused.plan(batch_size, 2 * gamma + 1, vocab_size, "rejection", processors)
        times = {cut: measure(inputs, cut, timer) for cut in dict.fromkeys([ours, *cuts(vocab_size)])}
        found = [[*cut, times[cut]] for cut in sorted(times, key=times.__getitem__)]
        rows.append({**verification_names(shape, dtype), "ours": [*ours, times[ours]], "cuts": found})
        print(*verification_names(shape, dtype).values(), "ours", rows[-1]["ours"], "best", found[:3], flush=True)
    return rows


def main(output: str, *batch_sizes: str) -> None:
    grid = Grid(batch_sizes=[int(size) for size in batch_sizes] or (8, 32))
    rows = sweep(grid, make_timer(grid.device, REPLAYS, CALLS))
    settings = {"replays": REPLAYS, "calls": CALLS, "columns": [*fused.Plan._fields, "microseconds"]}
    result = {"kind": "sweep", "provenance": provenance(grid.device), "settings": settings, "rows": rows}
    Path(output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
