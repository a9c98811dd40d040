"""Whole answers, timed: every method on every prompt, interleaved, so that only ratios within one run are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from flashspec.bench import report
from flashspec.bench.methods import HF_DTYPES, Method, Setup, Take, is_arm, make_method
from flashspec.bench.prompts import SMALL, load_prompts
from flashspec.bench.provenance import provenance
from flashspec.config import default_device
from flashspec.core import FlashSpecError
from flashspec.metrics import AcceptanceTracker
from flashspec.metrics.arms import summarise_arms

DEFAULT_METHODS = ("hf-float32", "hf-bfloat16", "plain", "auto")
Batches = list[list[list[int]]]  # of prompts' token ids
Progress = Callable[[str, float | None], None]


def run(
    target: Any = "smollm2",
    drafters: Sequence[str] = (),
    prompts: Sequence[Path] = (),
    methods: Sequence[str] = DEFAULT_METHODS,
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    output: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
    shape: str | None = None,
    batch_sizes: Sequence[int] = (1,),
) -> report.Result:
    """Decode every prompt with every method; returns {"kind", "provenance", "settings", "rows"}, written to `output`
    with CSV and plot beside it. Every rate is tokens over wall time from call to last token, prefill included; a row's
    speeds are medians over its batches, speed-ups medians of per-batch ratios, acceptance is that of all answers
    together. speedup_vs_hf is over the fastest of transformers' plain and compiled generate; null where the other side
    of a ratio was not among the methods.
    acceptance_per_position: of the draft tokens at each position, the share that was accepted. device None: what the
    machine has. drafters: names, ids, folders of models or heads, GGUF files; none of them: the default ones. methods:
    as `make_method` has them. Ahead of each set and batch size every method decodes the longest batch once, which is no
    take: it compiles, captures, warms up, and a selector learns from it as from all. first_call_seconds: of the first
    of these calls; it stands in the row of the first prompts and batch size; null in all others.
    shape: widen the target to it, and the heads with it."""
    single = [name for name in methods if name in ("hf-lookup", "hf-assisted")]
    if single and max(batch_sizes) > 1:
        raise FlashSpecError(f"method {single[0]!r} decodes one prompt at a time: leave it out, or batch size 2 and up")
    device = device or default_device()
    origin = provenance(device)  # now, not when the files may have changed
    setup = Setup.load(target, drafters or None, device, dtype, max_new_tokens, temperature, progress, shape)
    sets = [load_prompts(path, limit) for path in prompts] or [SMALL.spread(limit)]
    encoded = {found.name: [_encode(prompt, setup) for prompt in found.prompts] for found in sets}
    longest = max(len(prompt) for found in encoded.values() for prompt in found)
    setup = replace(setup, room=longest + max_new_tokens, arms=tuple(name for name in methods if is_arm(name)))
    made = {name: make_method(name, setup) for name in methods}
    rows: list[dict[str, Any]] = []
    for name, found in encoded.items():
        for size in batch_sizes:
            takes, first = _decode(name, batches(found, size), made, progress)
            rows += summarise(name, takes, {} if rows else first, size)
    settings = {
        "target": setup.loaded.name,
        "drafters": [setup.short(name) for name in setup.drafters],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "dtype": dtype,
        "hf_lookup": "prompt_lookup_num_tokens=5, float32 on a CPU, bfloat16 on a GPU",
        "hf_assisted": "transformers' default assistant schedule, dtype as hf_lookup",
    }
    result = {"kind": "endtoend", "provenance": origin, "settings": settings, "rows": rows}
    if output is not None:
        report.write(result, output)
    return result


def batches(prompts: list[list[int]], size: int) -> Batches:
    """In order; the last one is filled up from the beginning, so that all are full."""
    count = -(-len(prompts) // size)
    filled = (prompts * size)[: count * size]
    return [filled[start : start + size] for start in range(0, len(filled), size)]


def _decode(
    name: str, found: Batches, methods: dict[str, Method], progress: Progress | None
) -> tuple[dict[str, list[Take]], dict[str, float]]:
    """Takes, and the seconds of each method's call ahead of them: new prompts or batch sizes may want captures too."""
    takes: dict[str, list[Take]] = {method: [] for method in methods}
    order = list(methods)
    longest = max(found, key=lambda batch: max(map(len, batch)))
    first = {method: methods[method](longest).seconds for method in order}
    for index, batch in enumerate(found):
        for method in order[index % len(order) :] + order[: index % len(order)]:  # no method is always first
            takes[method].append(methods[method](batch))
        if progress is not None:
            progress(name, (index + 1) / len(found))
    return takes, first


def _encode(prompt: str, setup: Setup) -> list[int]:
    tokenizer = setup.loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"target {setup.loaded.name} has no tokenizer: end-to-end benchmarks need one")
    return tokenizer.encode_question(prompt)


def summarise(
    prompts: str, takes: dict[str, list[Take]], first: dict[str, float], batch_size: int = 1
) -> list[dict[str, Any]]:
    """One row a method; n counts answers; first: seconds of the first call, of methods that had none before."""
    plain = takes.get("plain")
    hugging_face = [takes[name] for name in (*HF_DTYPES, "hf-compiled") if name in takes]
    best = max(hugging_face, key=lambda found: median(take.tokens_per_second for take in found), default=None)
    reference = takes.get("hf-float32")
    return [
        {
            "method": name,
            "prompts": prompts,
            "batch_size": batch_size,
            "n": sum(len(take.rows) for take in found),
            "tokens": sum(take.n_tokens for take in found),
            "tokens_per_second": round(median(take.tokens_per_second for take in found), 2),
            "first_call_seconds": round(first[name], 3) if name in first else None,
            "acceptance_length": _acceptance_length(found),
            "acceptance_per_position": _acceptance_per_position(found),
            "speedup_vs_plain": _speedup(found, plain),
            "speedup_vs_hf": _speedup(found, best),
            "same_text_as_hf_float32": _agreement(found, reference),
            "same_text_as_plain": _agreement(found, plain),
            "arms": [arm.as_dict() for arm in summarise_arms([step for take in found for step in take.steps])],
        }
        for name, found in takes.items()
    ]


def _speedup(takes: list[Take], baseline: list[Take] | None) -> float | None:
    if baseline is None:
        return None
    pairs = zip(takes, baseline, strict=True)
    return round(median(take.tokens_per_second / other.tokens_per_second for take, other in pairs), 3)


def _acceptance_length(takes: list[Take]) -> float | None:
    """Tokens emitted a row per target forward, of all answers together."""
    steps = [step for take in takes for step in take.steps]
    forwards = sum(len(step.rows) for step in steps)
    return round(sum(step.emitted for step in steps) / forwards, 3) if forwards else None


def _acceptance_per_position(takes: list[Take]) -> list[float] | None:
    drafts = [row for take in takes for step in take.steps for row in step.rows if row.drafted]
    if not drafts:
        return None
    tracker = AcceptanceTracker(max(row.drafted for row in drafts))
    for row in drafts:
        tracker.record(row.accepted, row.drafted)
    return [round(share, 3) for share in tracker.per_position]


def _agreement(takes: list[Take], reference: list[Take] | None) -> float | None:
    """The share of answers whose tokens are exactly those of the reference."""
    if reference is None:
        return None
    pairs = [pair for a, b in zip(takes, reference, strict=True) for pair in zip(a.rows, b.rows, strict=True)]
    return round(sum(a == b for a, b in pairs) / len(pairs), 3)
