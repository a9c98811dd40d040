"""The result files of one GPU: python benchmarks/measure_gpu.py MODEL PROMPTS OUTPUT [--head FOLDER ...] [--parts a,b].

MODEL: SmolLM2's GGUF. PROMPTS: a folder with mt_bench.jsonl, humaneval.jsonl and alpaca.jsonl. OUTPUT: a folder for the
files. A head adds the arms of its kind; without any they are those that come with the package. A part that fails says
so, and the others still run."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flashspec.bench import endtoend, kernels, steps
from flashspec.bench.report import table
from flashspec.bench.steps import BASELINES, Plan
from flashspec.drafters.heads import head_kind

SETS = ("mt_bench", "humaneval", "alpaca")
LOOKUPS = ["plain", "ngram:4", "suffix:15", "early-exit:2", "auto"]
SHIPPED = ["eagle3", "medusa"]
HEADS = {"medusa": ["medusa:4"], "eagle3": ["eagle3:4", "eagle3:6"], "tiny": ["tiny:4"]}
SELECTORS = ["ucb1@arms", "thompson@arms", "auto@arms"]  # all over the same arms
TRANSFORMERS = ["hf-bfloat16", "hf-compiled", "hf-lookup", "hf-assisted"]
SIZES = ["30m", "135m", "360m", "1b"]
CONSOLE = Console(width=170)


def make_parts(model: str, prompts: Path, output: Path, heads: list[str], limit: int) -> dict[str, Callable[[], Any]]:
    """What can be measured, by name. heads: folders, or kinds of heads in the package. limit: prompts a set."""
    arms = [arm for head in heads for arm in HEADS[head_kind(head) or head]]
    sets = [prompts / f"{name}.jsonl" for name in SETS]
    gpu = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")

    def text(
        name: str, methods: list[str], drafters: list[str], limit: int = limit, sets: list[Path] = sets, **options: Any
    ) -> Any:
        return endtoend.run(
            model,
            drafters,
            sets,
            methods,
            limit=limit,
            device="cuda",
            dtype="bfloat16",
            output=output / f"{name}-{gpu}.json",
            **options,
        )

    def lookups(name: str, **options: Any) -> Any:
        return text(name, ["hf-compiled", *LOOKUPS], ["suffix", "ngram"], **options)

    def headline(name: str, **options: Any) -> Any:
        return text(name, ["plain", *arms, "ngram:4", "suffix:15", *SELECTORS], ["suffix", "ngram", *heads], **options)

    def accepting(name: str, limit: int, **options: Any) -> Any:
        return text(name, ["plain", *(arm for arm in arms if arm.endswith(":4"))], heads, limit, **options)

    def against(name: str, **options: Any) -> Any:
        """The small model assists, itself too: there is none that is smaller. Half the prompts, since it is slow."""
        methods = [*TRANSFORMERS, *LOOKUPS[:4], "auto@arms"]
        return text(name, methods, ["suffix", "ngram", model], max(1, limit // 2), max_new_tokens=64, **options)

    def stepping(name: str, shape: str, plan: Plan, **options: Any) -> Any:
        out = output / f"{name}-{gpu}.json"
        return steps.run(shape=shape, random=True, device="cuda", output=out, plan=plan, **options)

    def drafting(name: str, **options: Any) -> Any:
        out, plan = output / f"{name}-{gpu}.json", Plan(widths=[1], arms=["plain", *arms])
        return steps.run(model, drafters=heads, device="cuda", dtype="bfloat16", output=out, plan=plan, **options)

    return {
        "text-8b": lambda: lookups("text-8b", shape="8b"),
        "text-135m": lambda: lookups("text-135m"),
        "text-8b-t07": lambda: lookups("text-8b-t07", shape="8b", temperature=0.7),
        "text-135m-t07": lambda: lookups("text-135m-t07", temperature=0.7),
        "heads-8b": lambda: headline("heads-8b", shape="8b"),
        "heads-135m": lambda: headline("heads-135m"),
        "heads-8b-t07": lambda: headline("heads-8b-t07", shape="8b", temperature=0.7),
        "heads-135m-t07": lambda: headline("heads-135m-t07", temperature=0.7),
        "accepted-135m": lambda: accepting("accepted-135m", 80),
        "accepted-135m-t07": lambda: accepting("accepted-135m-t07", 80, temperature=0.7),
        "accepted-8b": lambda: accepting("accepted-8b", 24, shape="8b"),
        "steps-8b": lambda: stepping("steps-8b", "8b", Plan(drafter_sizes=SIZES, baselines=BASELINES[:2])),
        "steps-1b": lambda: stepping("steps-1b", "1b", Plan(baselines=BASELINES[:2])),
        "steps-135m": lambda: stepping("steps-135m", "135m", Plan(baselines=BASELINES[:2])),
        "steps-heads-8b": lambda: drafting("steps-heads-8b", shape="8b"),
        "steps-heads-135m": lambda: drafting("steps-heads-135m"),
        "kernels": lambda: kernels.run(output / f"kernels-{gpu}.json"),
        "batches-8b": lambda: text(
            "batches-8b",
            ["plain", "ngram:4", "auto"],
            ["suffix", "ngram"],
            32,
            sets[:1],
            shape="8b",
            batch_sizes=[1, 4, 8, 16, 32],
        ),
        "transformers-8b": lambda: against("transformers-8b", shape="8b"),
        "transformers-8b-t07": lambda: against("transformers-8b-t07", shape="8b", temperature=0.7),
        "transformers-135m": lambda: against("transformers-135m"),
        "transformers-135m-t07": lambda: against("transformers-135m-t07", temperature=0.7),
        "steps-8b-batches": lambda: stepping(
            "steps-8b-batches", "8b", Plan(widths=[1, 5], batch_sizes=[8, 32], arms=["plain", "ngram:4"])
        ),
        "steps-8b-compiled": lambda: stepping(
            "steps-8b-compiled", "8b", Plan(widths=[1, 5], arms=[], baselines=BASELINES[2:])
        ),
        "steps-70b": lambda: stepping("steps-70b", "70b", Plan(widths=[1, 5], arms=["plain"]), calls=1, new_tokens=32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--head", action="append", default=[], help="folder of a head, or a kind in the package")
    parser.add_argument("--parts", default="", help="names, in their order; all if empty")
    parser.add_argument("--limit", type=int, default=6, help="prompts a set")
    options = parser.parse_args()
    parts = make_parts(options.model, options.prompts, options.output, options.head or SHIPPED, options.limit)
    for name in options.parts.split(",") if options.parts else parts:
        began = time.perf_counter()
        try:
            CONSOLE.print(table(parts[name]()))
        except Exception:
            traceback.print_exc(limit=4)
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        print(f"== {name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
