"""Is it slower than it was? Two result files of one benchmark, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flashspec.bench.report import COLUMNS, NAME, Column, Result, kind_of
from flashspec.core import FlashSpecError
from flashspec.models.checkpoint import read_json

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """ratio: new over old in speed, so below 1 is slower."""

    row: str
    figure: str
    old: float
    new: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """unmatched: rows of only one of the files. same_hardware: whether absolute figures were compared, too."""

    changes: list[Change]
    unmatched: int
    same_hardware: bool
    tolerance: float

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.ratio < 1 - self.tolerance]

    def table(self) -> Table:
        place = "the same hardware" if self.same_hardware else "different hardware, ratios within each run only"
        found = Table(title=f"{place}; {self.unmatched} rows are in one file only", box=SIMPLE_HEAD)
        for heading in ("row", "figure", "old", "new", "new / old in speed"):
            found.add_column(heading, justify="left" if heading in ("row", "figure") else "right")
        for change in self.changes:
            slower = change in self.regressions
            ratio = f"{change.ratio:.3f}" + (" slower" if slower else "")
            old, new = f"{change.old:.4g}", f"{change.new:.4g}"
            found.add_row(change.row, change.figure, old, new, ratio, style="red" if slower else None)
        return found


def compare(old: Path, new: Path, tolerance: float = 0.05) -> Comparison:
    """FlashSpecError where the files are no results, of different benchmarks, or have no row in common."""
    before, after = _read(old), _read(new)
    kind = kind_of(before)
    if kind != kind_of(after):
        raise FlashSpecError(f"{old} holds {kind} and {new} holds {kind_of(after)}: compare results of one benchmark")
    targets = [result.get("settings", {}).get("target") for result in (before, after)]
    if targets[0] != targets[1]:
        raise FlashSpecError(
            f"{old} measures {targets[0]} and {new} measures {targets[1]}: compare results of one target"
        )
    names = [column.key for column in COLUMNS[kind] if column.role == NAME]
    old_rows, new_rows = _by_name(before, names), _by_name(after, names)
    common = [key for key in old_rows if key in new_rows]
    if not common:
        raise FlashSpecError(f"{old} and {new} have no row in common: rows are told apart by {', '.join(names)}")
    same = _same_hardware(before, after)
    figures = [
        column for column in COLUMNS[kind] if column.role == "ratio" or (same and column.role in ("speed", "time"))
    ]
    changes = [
        change for key in common for figure in figures if (change := _change(key, figure, old_rows[key], new_rows[key]))
    ]
    unmatched = len(old_rows) + len(new_rows) - 2 * len(common)
    return Comparison(changes, unmatched, same, tolerance)


def _read(path: Path) -> Result:
    result = read_json(path)
    rows = result.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or "provenance" not in result:
        raise FlashSpecError(f"{path} is no benchmark result: it should hold 'provenance' and 'rows'")
    if kind_of(result) not in COLUMNS:
        raise FlashSpecError(f"{path} holds {kind_of(result)!r}, this version knows {', '.join(COLUMNS)}")
    return result


def _by_name(result: Result, names: list[str]) -> dict[Key, dict[str, Any]]:
    """batch_size is 1 in files of before it was written."""
    return {tuple(row.get(name, 1 if name == "batch_size" else None) for name in names): row for row in result["rows"]}


def _same_hardware(old: Result, new: Result) -> bool:
    sides = [result["provenance"].get("hardware", {}) for result in (old, new)]
    return all(sides[0].get(field) == sides[1].get(field) for field in ("gpu", "cpu", "threads"))


def _change(key: Key, figure: Column, old: dict[str, Any], new: dict[str, Any]) -> Change | None:
    before, after = old.get(figure.key), new.get(figure.key)
    if not before or not after:
        return None
    ratio = before / after if figure.role == "time" else after / before
    return Change(" ".join(str(part) for part in key if part is not None), figure.heading, before, after, ratio)
