"""What a profile shows between a GPU's kernels: python benchmarks/measure_gpu_gaps.py MODEL OUTPUT [SHAPE ...].

For the model as it is and widened to each shape, and a few arms: how long a step keeps the device busy and how long it
leaves it idle, and the largest gaps. The times are a profiler's, under which a step takes longer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flashspec import SpeculativeEngine
from flashspec.bench.provenance import provenance
from flashspec.bench.widen import widened_model
from flashspec.models.loading import load_model

ARMS = (["plain"], ["ngram:4"], ["suffix:15"], ["plain", "ngram:4", "suffix:15"])
PROMPT = [{"role": "user", "content": "Write a Python function that checks whether a word is a palindrome."}]
TOKENS = 128


def idle(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """(time with anything running, the gaps) of (begin, end) spans that may overlap."""
    busy, gaps = 0.0, list[float]()
    ordered = sorted(spans)
    begin, end = ordered[0]
    for start, stop in ordered[1:]:
        if start > end:
            busy += end - begin
            gaps.append(start - end)
            begin = start
        end = max(end, stop)
    return busy + end - begin, gaps


def measure(loaded: Any, arms: list[str]) -> dict[str, Any]:
    names = dict.fromkeys(arm.partition(":")[0] for arm in arms if arm != "plain")
    engine = SpeculativeEngine.from_pretrained(loaded, list(names), device="cuda", arms=arms)
    engine.generate(PROMPT, TOKENS, temperature=0.0)  # captures, and warms up
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        result = engine.generate(PROMPT, TOKENS, temperature=0.0)
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    spans = sorted(spans)[-len(spans) // 2 :]  # the second half, behind the prefill
    busy, gaps = idle(spans)
    steps = len(result.steps) * (spans[-1][1] - spans[0][0]) / 1e6 / sum(step.seconds for step in result.steps)
    gaps.sort()
    return {
        "target": loaded.name,
        "arms": ", ".join(arms),
        "steps": len(result.steps),
        "launches_per_step": round(len(spans) / steps, 1),
        "busy_microseconds": round(busy / steps, 1),
        "idle_microseconds": round(sum(gaps) / steps, 1),
        "largest_gaps_microseconds": [round(gap, 1) for gap in gaps[-3:]],
    }


def main(model: str, output: str, *shapes: str) -> None:
    rows = []
    for shape in (None, *shapes):
        loaded = widened_model(model, shape, "cuda", "bfloat16")[0] if shape else load_model(model, device="cuda")
        for arms in ARMS:
            rows.append(measure(loaded, arms))
            print(rows[-1], flush=True)
    settings = {"new_tokens": TOKENS, "temperature": 0.0}
    result = {"kind": "gaps", "provenance": provenance("cuda"), "settings": settings, "rows": rows}
    Path(output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
