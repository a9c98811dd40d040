"""Plots of results, one kind of benchmark a function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(kind: str, result: dict[str, Any], path: Path) -> None:
    """A picture of a result's rows at `path`; nothing without matplotlib, or without rows."""
    try:
        import matplotlib
    except ImportError:
        return
    if not result["rows"]:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot = {"endtoend": _endtoend, "kernels": _kernels, "steps": _steps}[kind]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    plot(axes, result)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=7, ncols=3, frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _endtoend(axes: Any, result: dict[str, Any]) -> None:
    axes.set_title(result["settings"]["target"], fontsize=10)
    axes.set_ylabel("tokens per second (median over prompts)")
    if len({row.get("batch_size", 1) for row in result["rows"]}) > 1:
        _lines(axes, result["rows"], "batch_size", "tokens_per_second", "{prompts} {method}")
        axes.set_xlabel("batch size")
        return
    sets = list(dict.fromkeys(row["prompts"] for row in result["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        heights = {row["prompts"]: row["tokens_per_second"] for row in result["rows"] if row["method"] == method}
        bars = axes.bar([i + place * width for i in range(len(sets))], [heights[name] for name in sets], width)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        bars.set_label(method)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(sets))], sets)


def _kernels(axes: Any, result: dict[str, Any]) -> None:
    """Achieved against moved bytes, below the line that a copy reaches."""
    rows = [row for row in result["rows"] if row.get("tb_per_second")]
    _lines(axes, rows, "bytes", "tb_per_second", "{kernel} {dtype}", style="o")
    axes.axhline(result["settings"]["copy_tb_per_second"], color="grey", linestyle="--", label="copy")
    axes.set_xscale("log")
    axes.set_xlabel("bytes that have to be read")
    axes.set_ylabel("TB per second, nothing cached")


def _steps(axes: Any, result: dict[str, Any]) -> None:
    rows = [
        row | {"drafter": (row.get("arm") or "").rpartition(":")[0]}
        for row in result["rows"]
        if row["part"] != "drafter"
    ]
    batch = " batch {batch_size}" if len({row.get("batch_size", 1) for row in rows}) > 1 else ""
    _lines(axes, rows, "width", "microseconds", "{part} {method} {drafter}" + batch)
    axes.set_title(result["settings"]["target"], fontsize=10)
    axes.set_xlabel("tokens a forward")
    axes.set_ylabel("microseconds")
    axes.set_yscale("log")


def _lines(axes: Any, rows: list[Row], x: str, y: str, label: str, style: str = "o-") -> None:
    """One line for each different label."""
    name: Callable[[Row], str] = lambda row: " ".join(label.format_map(defaultdict(str, row)).split())  # noqa: E731
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        series[name(row)].append((row[x], row[y]))
    for text, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), style, label=text, markersize=4)
