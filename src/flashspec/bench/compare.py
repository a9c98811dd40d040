"""Is it slower than it was? Two result files of one benchmark, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flashspec.bench.report import COLUMNS, NAME, Column, Result, commit_of, kind_of
from flashspec.core import FlashSpecError
from flashspec.models.checkpoint import read_json

Key = tuple[Any, ...]
# That decide the figures.
SETTINGS = ("target", "shape", "dtype", "temperature", "max_new_tokens", "new_tokens", "context")


@dataclass(frozen=True, slots=True)
class Change:
    """ratio: new over old, of times old over new, so below 1 is worse. tolerance: how far below is none."""

    row: str
    figure: str
    old: float
    new: float
    ratio: float
    tolerance: float

    @property
    def fell(self) -> bool:
        return self.ratio < 1 - self.tolerance


@dataclass(frozen=True, slots=True)
class Comparison:
    """missing: rows, and figures of rows, that the new file lacks. same_hardware: whether absolute figures were
    compared, too. commits: of the old and the new file, '?' where one does not say."""

    changes: list[Change]
    missing: list[str]
    same_hardware: bool
    commits: tuple[str, str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.fell]

    @property
    def heading(self) -> str:
        place = "the same hardware" if self.same_hardware else "different hardware, ratios within each run only"
        return f"{len(self.changes)} figures, {' to '.join(self.commits)}, {place}"

    def table(self, everything: bool = True) -> Table:
        """Of all figures, or of those that fell."""
        missing = f"not in the new file: {', '.join(self.missing)}" if self.missing else None
        shown = self.changes if everything else self.regressions
        found = Table(title=self.heading, caption=missing, box=SIMPLE_HEAD)
        for heading in ("row", "figure", "old", "new", "new / old, of times old / new"):
            found.add_column(heading, justify="left" if heading in ("row", "figure") else "right")
        for change in shown:
            ratio = f"{change.ratio:.3f}" + (" fell" if change.fell else "")
            old, new = f"{change.old:.4g}", f"{change.new:.4g}"
            found.add_row(change.row, change.figure, old, new, ratio, style="red" if change.fell else None)
        return found


def compare(old: Path, new: Path, tolerance: float = 0.05) -> Comparison:
    """tolerance: how far a figure may fall; shares of the same text may not. FlashSpecError where the files are no
    results, of different benchmarks, settings or prompts, have two rows of one name, or no row in common."""
    before, after = _read(old), _read(new)
    kind = kind_of(before)
    if kind != kind_of(after):
        raise FlashSpecError(f"{old} holds {kind} and {new} holds {kind_of(after)}: compare results of one benchmark")
    names = [column.key for column in COLUMNS[kind] if column.role == NAME]
    old_rows, new_rows = _by_name(old, before, names), _by_name(new, after, names)
    common = [key for key in old_rows if key in new_rows]
    differences = [_difference(name, *(result.get("settings", {}) for result in (before, after))) for name in SETTINGS]
    differences += [_difference("n", old_rows[key], new_rows[key]) for key in common]
    if found := next(filter(None, differences), None):
        raise FlashSpecError(f"{old} and {new} differ in {found}: compare results of the same settings")
    if not common:
        raise FlashSpecError(f"{old} and {new} have no row in common: rows are told apart by {', '.join(names)}")
    same = _same_hardware(before, after)
    sampled = bool(before.get("settings", {}).get("temperature"))
    compared = [
        (key, figure)
        for key in common
        for figure in COLUMNS[kind]
        if _is_compared(figure, old_rows[key], same, sampled)
    ]
    changes = [
        change for key, figure in compared if (change := _change(key, figure, old_rows[key], new_rows[key], tolerance))
    ]
    missing = [_label(key) for key in old_rows if key not in new_rows]
    missing += [
        f"{_label(key)} {figure.heading}"
        for key, figure in compared
        if old_rows[key].get(figure.key) is not None and new_rows[key].get(figure.key) is None
    ]
    return Comparison(changes, missing, same, (commit_of(before) or "?", commit_of(after) or "?"))


def _difference(name: str, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    before, after = old.get(name), new.get(name)
    return None if before == after else f"{'answers a row' if name == 'n' else name}, {before} and {after}"


def _is_compared(figure: Column, row: dict[str, Any], same_hardware: bool, sampled: bool) -> bool:
    """Sampled texts differ by chance, and transformers' are its own. A selector's choices follow the clock, and what it
    accepts follows them."""
    if figure.role == "length":
        return ":" in row["method"]
    if figure.role == "share":
        return not sampled and not row["method"].startswith("hf-")
    return figure.role == "ratio" or (figure.role in ("speed", "time") and same_hardware)


def _read(path: Path) -> Result:
    result = read_json(path)
    rows = result.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or "provenance" not in result:
        raise FlashSpecError(f"{path} is no benchmark result: it should hold 'provenance' and 'rows'")
    if kind_of(result) not in COLUMNS:
        raise FlashSpecError(f"{path} holds {kind_of(result)!r}, this version knows {', '.join(COLUMNS)}")
    return result


def _by_name(path: Path, result: Result, names: list[str]) -> dict[Key, dict[str, Any]]:
    """batch_size is 1 in files of before it was written."""
    found: dict[Key, dict[str, Any]] = {}
    for row in result["rows"]:
        key = tuple(row.get(name, 1 if name == "batch_size" else None) for name in names)
        if key in found:
            raise FlashSpecError(f"{path} has two rows {_label(key)!r}: rows are told apart by {', '.join(names)}")
        found[key] = row
    return found


def _same_hardware(old: Result, new: Result) -> bool:
    sides = [result["provenance"].get("hardware", {}) for result in (old, new)]
    return all(sides[0].get(field) == sides[1].get(field) for field in ("gpu", "cpu", "threads"))


def _change(key: Key, figure: Column, old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Change | None:
    before, after = old.get(figure.key), new.get(figure.key)
    if not before or after is None or (figure.role == "time" and not after):
        return None
    ratio = before / after if figure.role == "time" else after / before
    return Change(_label(key), figure.heading, before, after, ratio, 0.0 if figure.role == "share" else tolerance)


def _label(key: Key) -> str:
    return " ".join(str(part) for part in key if part is not None)
