"""Results as files, tables and plots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


def table(result: dict[str, Any]) -> Table:
    """Rows in the order they were measured."""
    found = Table(title=f"{result['settings']['target']}, {result['settings']['max_new_tokens']} new tokens")
    for heading in ("prompts", "method", "n"):
        found.add_column(heading)
    for heading in ("tokens/s", "tokens/forward", "vs plain", "vs transformers", "same text"):
        found.add_column(heading, justify="right")
    for row in result["rows"]:
        found.add_row(
            row["prompts"],
            row["method"],
            str(row["n"]),
            f"{row['tokens_per_second']:.1f}",
            _number(row["acceptance_length"], "{:.2f}"),
            _number(row["speedup_vs_plain"], "{:.2f}x"),
            _number(row["speedup_vs_hf"], "{:.2f}x"),
            _number(row["same_text_as_hf_float32"], "{:.0%}"),
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The same table for a README, one line a method and a column of tokens per second and speed-ups a prompt set."""
    rows, settings, versions = result["rows"], result["settings"], result["provenance"]["versions"]
    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["prompts"]): row for row in rows}
    lines = [
        "| method | " + " | ".join(f"{name}: tokens/s, × transformers, × plain, same text" for name in sets) + " |",
        "|---|" + "---|" * len(sets),
    ]
    for method in methods:
        found = [cells[method, name] for name in sets]
        lines.append(f"| {method} | " + " | ".join(map(_cell, found)) + " |")
    hardware = result["provenance"]["hardware"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    lines += [
        "",
        f"{settings['target']}, {rows[0]['n']} prompts a set, {settings['max_new_tokens']} new tokens, "
        f"temperature {settings['temperature']:g}; {place}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; {result['provenance']['date'][:10]}.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    speeds = [_number(row[name], "{:.2f}×") for name in ("speedup_vs_hf", "speedup_vs_plain")]
    same = _number(row["same_text_as_hf_float32"], "{:.0%}")
    return ", ".join(part for part in (f"{row['tokens_per_second']:.1f}", *speeds, same) if part)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens per second by method, one group of bars a prompt set; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 2.4 * len(sets), 4), layout="constrained")
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        heights = {row["prompts"]: row["tokens_per_second"] for row in rows if row["method"] == method}
        bars = axes.bar([i + place * width for i in range(len(sets))], [heights[name] for name in sets], width)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        bars.set_label(method)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(sets))], sets)
    axes.set_ylabel("tokens per second (median over prompts)")
    axes.set_title(result["settings"]["target"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=7, ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
