"""Results as files, tables and plots: what the columns of each kind of benchmark are is said here, once."""

from __future__ import annotations

import csv
import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flashspec.bench import plots

Result = dict[str, Any]  # {"kind", "provenance", "settings", "rows"}
Role = Literal["name", "speed", "time", "ratio", "length", "share", "note"]
NAME: Role = "name"
MOST_POSITIONS = 5  # of a draft, in a table; files hold them all


@dataclass(frozen=True, slots=True)
class Column:
    """key: of a row. role: a name tells rows apart; a speed is better when it grows, a time when it falls, both on one
    machine only; a ratio within one run, a length in tokens and a share of answers are better when they grow, on any
    machine; a note is not compared."""

    key: str
    heading: str
    form: str
    role: Role


def _name(key: str, heading: str | None = None) -> Column:
    return Column(key, heading or key, "{}", NAME)


COLUMNS = {
    "endtoend": (
        _name("prompts"),
        _name("method"),
        _name("batch_size", "batch"),
        Column("tokens_per_second", "tokens/s", "{:.1f}", "speed"),
        Column("acceptance_length", "tokens per forward", "{:.2f}", "length"),
        Column("acceptance_per_position", "accepted by position", "{:.2f}", "note"),
        Column("speedup_vs_plain", "vs plain", "{:.2f}x", "ratio"),
        Column("speedup_vs_hf", "vs hf", "{:.2f}x", "ratio"),
        Column("same_text_as_hf_float32", "same text", "{:.0%}", "share"),
        Column("same_text_as_plain", "same as plain", "{:.0%}", "share"),
    ),
    "kernels": (
        _name("kernel"),
        _name("dtype"),
        _name("batch_size", "B"),
        _name("gamma", "γ"),
        _name("vocab_size", "V"),
        _name("queries", "Q"),
        _name("context"),
        _name("shape"),
        Column("microseconds", "µs", "{:.1f}", "time"),
        Column("cold_microseconds", "cold µs", "{:.1f}", "time"),
        Column("floor_microseconds", "floor µs", "{:.1f}", "note"),
        Column("tb_per_second", "TB/s", "{:.2f}", "note"),
        Column("roofline_share", "of roofline", "{:.0%}", "ratio"),
        Column("pytorch_microseconds", "PyTorch µs", "{:.1f}", "note"),
        Column("speedup_vs_pytorch", "vs PyTorch", "{:.1f}x", "ratio"),
        Column("flashinfer_microseconds", "FlashInfer µs", "{:.1f}", "note"),
        Column("speedup_vs_flashinfer", "vs FlashInfer", "{:.1f}x", "ratio"),
    ),
    "steps": (
        _name("part"),
        _name("method"),
        _name("arm"),
        _name("batch_size", "batch"),
        _name("width", "tokens"),
        Column("microseconds", "µs", "{:.0f}", "time"),
        Column("spread", "spread", "{:.0f}", "note"),
        Column("forward_microseconds", "of it forwards", "{:.0f}", "note"),
        Column("rest_microseconds", "the rest", "{:.0f}", "note"),
        Column("over_plain", "over plain", "{:.2f}x", "note"),
        Column("mbu", "MBU", "{:.2f}", "ratio"),
    ),
    "start": (
        _name("command"),
        _name("drafters"),
        _name("caches"),
        Column("seconds", "s", "{:.2f}", "time"),
        Column("first_token_seconds", "first token s", "{:.1f}", "time"),
        Column("answer_seconds", "answer s", "{:.1f}", "time"),
        Column("memory_beyond_gb", "GB beyond", "{:.2f}", "time"),
    ),
    "gaps": (
        _name("target"),
        _name("arms"),
        Column("busy_microseconds", "busy µs", "{:.0f}", "time"),
        Column("idle_microseconds", "idle µs", "{:.0f}", "time"),
    ),
}


def kind_of(result: Result) -> str:
    """Files of before kinds were written are told by their rows."""
    known: str = result.get("kind") or ("kernels" if any("kernel" in row for row in result["rows"]) else "endtoend")
    return known


def commit_of(result: Result) -> str:
    """Seven digits; '' in files that do not say."""
    return (result["provenance"].get("commit") or "")[:7]


def write(result: Result, path: Path) -> None:
    """JSON at `path`; beside it the rows as CSV, and a plot where matplotlib is installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        rows = [{key: _flat(value) for key, value in row.items() if key != "arms"} for row in result["rows"]]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plots.draw(kind_of(result), result, path.with_suffix(".png"))


def title(result: Result) -> str:
    settings = result["settings"]
    parts = [settings.get("target"), settings.get("dtype")]
    if "max_new_tokens" in settings:
        parts += [f"{settings['max_new_tokens']} new tokens", f"{result['rows'][0]['n']} answers a row"]
    if "copy_tb_per_second" in settings:
        parts.append(f"copies at {settings['copy_tb_per_second']:.3g} TB/s")
    return ", ".join(part for part in parts if part)


def cells(result: Result) -> tuple[list[Column], list[list[str]]]:
    """The columns that any row fills, a batch size of 1 aside, and the rows as text."""
    filled = [
        column
        for column in COLUMNS[kind_of(result)]
        if any(row.get(column.key) not in (None, 1 if column.key == "batch_size" else None) for row in result["rows"])
    ]
    return filled, [[_number(row.get(column.key), column.form) for column in filled] for row in result["rows"]]


def table(result: Result) -> Table:
    """Rows in the order they were measured; what is the same in all of them is said in the title, below them what
    could not be measured."""
    columns, rows = cells(result)
    varying = [index for index in range(len(columns)) if len({row[index] for row in rows}) > 1 or len(rows) < 2]
    same = [f"{columns[index].heading} {rows[0][index]}" for index in range(len(columns)) if index not in varying]
    heading = ", ".join([title(result), *same])
    missing = "\n".join(f"left out: {reason}" for reason in result["settings"].get("left_out", ()))
    found = Table(title=heading, caption=escape(missing) or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (columns[index] for index in varying):
        whole = column.role != "note"
        found.add_column(_folded(column.heading), justify="left" if column.role == NAME else "right", no_wrap=whole)
    for row in rows:
        found.add_row(*(row[index] for index in varying))
    return found


def _folded(heading: str) -> str:
    """Over two lines, where it has two words."""
    return textwrap.fill(heading, len(heading) // 2 + 1, break_long_words=False)


def markdown(result: Result) -> str:
    """A table for a README, and a line that says where its numbers come from."""
    kind, settings, versions = kind_of(result), result["settings"], result["provenance"]["versions"]
    hardware = result["provenance"]["hardware"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    what = title(result)
    if kind == "endtoend":
        what = (
            f"{settings['target']}, {result['rows'][0]['n']} prompts a set, {settings['max_new_tokens']} new tokens, "
            f"temperature {settings['temperature']:g}"
        )
    source = f"torch {versions['torch']}, transformers {versions['transformers']}"
    day, commit = result["provenance"]["date"][:10], commit_of(result)
    when = f"{day}, commit {commit}" if commit else day
    lines = _by_method(result) if kind == "endtoend" else _plain_markdown(result)
    return "\n".join([*lines, "", f"{what}; {place}; {source}; {when}."])


def _plain_markdown(result: Result) -> list[str]:
    columns, rows = cells(result)
    rule = "|" + "|".join("---" if column.role == NAME else "---:" for column in columns) + "|"
    return [_line([column.heading for column in columns]), rule, *map(_line, rows)]


def _by_method(result: Result) -> list[str]:
    """One line a method, a column of tokens per second and speed-ups a prompt set, and batch size if there are many."""
    rows = result["rows"]
    several = len({row.get("batch_size", 1) for row in rows}) > 1

    def heading(row: dict[str, Any]) -> str:
        return f"{row['prompts']}, batch {row['batch_size']}" if several else str(row["prompts"])

    groups = list(dict.fromkeys(map(heading, rows)))
    found = {(row["method"], heading(row)): row for row in rows}
    told = [name for key, (name, _) in SUMMARY.items() if any(row.get(key) is not None for row in rows)]
    lines = [
        _line(["method", *(f"{name}: {', '.join(told)}" for name in groups)]),
        "|---|" + "---|" * len(groups),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append(_line([method, *(_summary(found[method, name]) for name in groups)]))
    return lines


def _line(parts: list[str]) -> str:
    return "| " + " | ".join(parts) + " |"


SUMMARY = {  # of a row: what it is called, how it is written
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "speedup_vs_hf": ("× transformers", "{:.2f}×"),
    "speedup_vs_plain": ("× plain", "{:.2f}×"),
    "same_text_as_hf_float32": ("same text", "{:.0%}"),
    "acceptance_length": ("tokens a forward", "{:.2f}"),  # last, as only ours have it
}


def _summary(row: dict[str, Any]) -> str:
    parts = (_number(row.get(key), form) for key, (_, form) in SUMMARY.items())
    return ", ".join(part for part in parts if part)


def _number(value: float | str | list[float] | None, form: str) -> str:
    if isinstance(value, list):
        shown = [form.format(part) for part in value[:MOST_POSITIONS]]
        return " ".join(shown + ["…"] * (len(value) > MOST_POSITIONS))
    return "" if value is None else form.format(value)


def _flat(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
