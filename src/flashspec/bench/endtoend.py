"""Whole answers, timed: every method on every prompt, interleaved, so that only ratios within one run are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from flashspec.bench.methods import HF_DTYPES, Method, Setup, Take, make_method
from flashspec.bench.prompts import SMALL, PromptSet, load_prompts
from flashspec.bench.provenance import provenance
from flashspec.bench.report import draw, write_json
from flashspec.engine import DEFAULT_DRAFTERS
from flashspec.metrics.arms import summarise_arms

DEFAULT_METHODS = ("hf-float32", "hf-bfloat16", "plain", "auto")


def run(
    target: Any = "smollm2",
    drafters: Sequence[str] = DEFAULT_DRAFTERS,
    prompts: Sequence[Path] = (),
    methods: Sequence[str] = DEFAULT_METHODS,
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    output: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Callable[[str, float | None], None] | None = None,
) -> dict[str, Any]:
    """Decode every prompt with every method; returns {"provenance", "settings", "rows"}, written to `output` with a
    plot beside it. Every rate is tokens over wall time from call to last token, prefill included; a row's figures are
    medians over its prompts, speed-ups medians of per-prompt ratios. speedup_vs_hf is over the faster dtype of
    transformers' plain generate; null where the other side of a ratio was not among the methods."""
    origin = provenance(device)  # now, not when the files may have changed
    setup = Setup.load(target, drafters, device, dtype, max_new_tokens, temperature, progress)
    sets = [load_prompts(path, limit) for path in prompts] or [SMALL]
    made = {name: make_method(name, setup) for name in methods}
    takes = {prompt_set.name: _decode(prompt_set, made, setup, progress) for prompt_set in sets}
    rows = [row for name, by_method in takes.items() for row in summarise(name, by_method)]
    settings = {
        "target": setup.loaded.name,
        "drafters": list(drafters),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "dtype": dtype,
        "hf_lookup": "prompt_lookup_num_tokens=5, float32",
        "hf_assisted": "transformers' default assistant schedule, float32",
    }
    result = {"provenance": origin, "settings": settings, "rows": rows}
    if output is not None:
        write_json(result, output)
        draw(result, output.with_suffix(".png"))
    return result


def _decode(
    prompt_set: PromptSet,
    methods: dict[str, Method],
    setup: Setup,
    progress: Callable[[str, float | None], None] | None,
) -> dict[str, list[Take]]:
    takes: dict[str, list[Take]] = {name: [] for name in methods}
    names = list(methods)
    encoded = [_encode(prompt, setup) for prompt in prompt_set.prompts]
    for name in names:
        methods[name](encoded[0])  # warm-up, not counted
    for index, token_ids in enumerate(encoded):
        for name in names[index % len(names) :] + names[: index % len(names)]:  # no method is always first
            takes[name].append(methods[name](token_ids))
        if progress is not None:
            progress(prompt_set.name, (index + 1) / len(encoded))
    return takes


def _encode(prompt: str, setup: Setup) -> list[int]:
    tokenizer = setup.loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"target {setup.loaded.name} has no tokenizer: end-to-end benchmarks need one")
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def summarise(prompts: str, takes: dict[str, list[Take]]) -> list[dict[str, Any]]:
    """One row a method."""
    plain = takes.get("plain")
    hugging_face = [takes[name] for name in HF_DTYPES if name in takes]
    best = max(hugging_face, key=lambda found: median(take.tokens_per_second for take in found), default=None)
    reference = takes.get("hf-float32")
    return [
        {
            "method": name,
            "prompts": prompts,
            "n": len(found),
            "tokens": sum(len(take.token_ids) for take in found),
            "tokens_per_second": round(median(take.tokens_per_second for take in found), 2),
            "acceptance_length": _acceptance_length(found),
            "speedup_vs_plain": _speedup(found, plain),
            "speedup_vs_hf": _speedup(found, best),
            "same_text_as_hf_float32": _agreement(found, reference),
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
    lengths = [sum(step.emitted for step in take.steps) / len(take.steps) for take in takes if take.steps]
    return round(median(lengths), 3) if lengths else None


def _agreement(takes: list[Take], reference: list[Take] | None) -> float | None:
    """The share of prompts whose tokens are exactly those of transformers in float32."""
    if reference is None:
        return None
    return round(sum(a.token_ids == b.token_ids for a, b in zip(takes, reference, strict=True)) / len(takes), 3)
