"""Kernels against the memory's speed and against PyTorch, inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashspec.bench import report
from flashspec.bench.cases import FAMILIES, QUICK, Call, Case, Grid
from flashspec.bench.provenance import provenance
from flashspec.bench.timing import Timer, copy_bandwidth, make_timer
from flashspec.core import FlashSpecError


def run(
    output: Path | None = None,
    kernels: Sequence[str] = (),
    grid: Grid | None = None,
    quick: bool = False,
    replays: int = 50,
    calls: int = 10,
    device: str = "cuda",
    progress: Callable[[str, float | None], None] | None = None,
) -> report.Result:
    """Returns {"kind", "provenance", "settings", "rows"}, written to `output`, with CSV and plot beside it.
    microseconds: a call's share of a replayed graph of `calls` calls, the median of `replays` replays, of two takes the
    second; spread: their difference. Logits are warm, as they were just written; weights and caches are cold.
    cold_microseconds rotates over inputs that no cache holds, and TB/s and roofline share rest on it. kernels: families
    of FAMILIES, all if empty. FlashSpecError without a GPU."""
    if not torch.cuda.is_available():
        raise FlashSpecError("kernels are measured inside CUDA graphs: this machine has no CUDA device")
    unknown = [name for name in kernels if name not in FAMILIES]
    if unknown:
        raise FlashSpecError(f"kernel {unknown[0]!r} is unknown; there are {', '.join(FAMILIES)}")
    chosen = replace(grid or (QUICK if quick else Grid()), device=device)
    timers = partial(make_timer, device, replays)
    bandwidth = copy_bandwidth(device, timers(calls))
    rows = []
    for name in kernels or FAMILIES:
        for case in FAMILIES[name](chosen):
            if progress is not None:
                progress(f"measuring {name}", None)
            rows.append(measure(case, bandwidth, timers(calls), timers(max(calls, case.sets))))
            torch.cuda.empty_cache()
    settings = {"replays": replays, "calls": calls, "copy_tb_per_second": round(bandwidth / 1e12, 3)}
    result = {"kind": "kernels", "provenance": provenance(device), "settings": settings, "rows": rows}
    if output is not None:
        report.write(result, output)
    return result


def measure(case: Case, bandwidth: float, warm_timer: Timer, cold_timer: Timer) -> dict[str, Any]:
    """A case's row; cold_timer makes as many calls as there are input sets, or more."""

    def cold(call: Call) -> tuple[float, float]:
        return cold_timer(lambda index: call(index % case.sets))

    def warm(call: Call) -> tuple[float, float]:
        return warm_timer(lambda index: call(0))

    usual = cold if case.always_cold else warm
    microseconds, spread = usual(case.ours)
    row = {"kernel": case.kernel, **case.names, "microseconds": microseconds, "spread": spread}
    if case.n_bytes is not None:
        unaided = microseconds if case.always_cold else cold(case.ours)[0]
        floor = case.n_bytes / bandwidth * 1e6
        row |= {
            "bytes": case.n_bytes,
            "floor_microseconds": round(floor, 3),
            "cold_microseconds": unaided,
            "tb_per_second": round(case.n_bytes / unaided / 1e6, 3),
            "roofline_share": round(floor / unaided, 3),
        }
    for name, call in case.baselines.items():
        taken, baseline_spread = usual(call)
        row |= {f"{name}_microseconds": taken, f"{name}_spread": baseline_spread}
        row[f"speedup_vs_{name}"] = round(taken / microseconds, 2)
    return row
