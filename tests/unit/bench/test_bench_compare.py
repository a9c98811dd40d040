from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashspec.bench.compare import SETTINGS, compare
from flashspec.core import FlashSpecError

HERE = {"hardware": {"gpu": "A", "driver": "1"}, "commit": "1a2b3c4d5e6f"}
OTHER = {"hardware": {"gpu": "B", "driver": "1"}}


def endtoend(method: str, tokens_per_second: float, speedup: float | None = None) -> dict[str, Any]:
    row = {"prompts": "set", "method": method, "tokens_per_second": tokens_per_second, "n": 8}
    return row | {"speedup_vs_plain": speedup}


def write(path: Path, rows: list[dict[str, Any]], provenance: dict[str, Any] = HERE, **more: Any) -> Path:
    path.write_text(json.dumps({"provenance": provenance, "rows": rows, **more}))
    return path


def test_falls_beyond_the_tolerance_are_listed(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [endtoend("plain", 100.0), endtoend("auto", 200.0, 2.0), endtoend("gone", 1.0)])
    new = write(tmp_path / "new.json", [endtoend("plain", 96.0), endtoend("auto", 180.0, 1.9) | {"batch_size": 1}])
    found = compare(old, new, 0.05)
    assert [(change.row, change.figure) for change in found.regressions] == [("set auto 1", "tokens/s")]
    assert (found.missing, found.same_hardware, len(found.changes)) == (["set gone 1"], True, 3)
    assert (
        found.table(False).row_count == 1
        and found.table().row_count == 3
        and found.table().caption == "not in the new file: set gone 1"
    )
    assert compare(new, old).missing == []
    assert not compare(old, new, 0.2).regressions
    assert compare(old, new, 0.2).heading == "3 figures, 1a2b3c4 to 1a2b3c4, the same hardware"


def test_times_that_grow_are_falls(tmp_path: Path) -> None:
    row = {"kernel": "verify_logits", "batch_size": 1, "dtype": "float32", "spread": 1.0, "microseconds": 10.0}
    old = write(tmp_path / "old.json", [row])
    new = write(tmp_path / "new.json", [row | {"microseconds": 20.0, "spread": 9.0}], kind="kernels")
    (change,) = compare(old, new).regressions
    assert (change.figure, change.ratio) == ("µs", 0.5)
    assert not compare(new, old).regressions


@pytest.mark.parametrize(
    "kind, name, figure",
    [("gaps", "arms", "idle_microseconds"), ("start", "caches", "memory_beyond_gb"), ("start", "command", "seconds")],
)
def test_gaps_and_starts_may_grow_worse_too(tmp_path: Path, kind: str, name: str, figure: str) -> None:
    rows = [{name: "a", figure: 10.0}, {name: "b", figure: 10.0}]
    old = write(tmp_path / "old.json", rows, kind=kind)
    new = write(tmp_path / "new.json", [rows[0], rows[1] | {figure: 12.0}], kind=kind)
    (change,) = compare(old, new).regressions
    assert (change.row, change.new) == ("b", 12.0) and not compare(new, old).regressions


def test_figures_that_vanished_are_missing(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [endtoend("auto", 200.0, 2.0)])
    new = write(tmp_path / "new.json", [endtoend("auto", 200.0)])
    assert compare(old, new).missing == ["set auto 1 vs plain"]
    assert compare(new, old).missing == []


def test_on_other_hardware_only_ratios_count(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [endtoend("auto", 200.0, 2.0)])
    new = write(tmp_path / "new.json", [endtoend("auto", 20.0, 1.5)], OTHER)
    found = compare(old, new)
    (change,) = found.changes
    assert (change.figure, change.ratio, found.commits) == ("vs plain", 0.75, ("1a2b3c4", "?"))


def texts(method: str, plain: float, float32: float, length: float) -> dict[str, Any]:
    return endtoend(method, 1.0) | {
        "same_text_as_plain": plain,
        "same_text_as_hf_float32": float32,
        "acceptance_length": length,
    }


def test_a_text_that_is_no_longer_the_same_fell_however_rare(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [texts(method, 1.0, 0.5, 3.0) for method in ("auto", "hf-bfloat16")])
    new = write(tmp_path / "new.json", [texts(method, 0.99, 0.0, 3.0) for method in ("auto", "hf-bfloat16")], OTHER)
    found = compare(old, new, 0.05).regressions
    assert [(change.row, change.figure) for change in found] == [
        ("set auto 1", "same text"),
        ("set auto 1", "same as plain"),
    ]
    hot = {"settings": {"temperature": 0.7}}
    old, new = (write(path, json.loads(path.read_text())["rows"], **hot) for path in (old, new))
    assert not compare(old, new).regressions  # sampled texts need not be the same


def test_an_arm_that_accepts_less_fell(tmp_path: Path) -> None:
    """And what a selector accepts is the clock's doing."""
    old = write(tmp_path / "old.json", [texts(method, 1.0, 1.0, 3.0) for method in ("a:4", "b:4", "auto@arms")])
    lengths = {"a:4": 2.8, "b:4": 2.9, "auto@arms": 2.0}
    new = write(tmp_path / "new.json", [texts(method, 1.0, 1.0, length) for method, length in lengths.items()])
    (change,) = compare(old, new, 0.05).regressions
    assert (change.row, change.figure) == ("set a:4 1", "tokens per forward")


@pytest.mark.parametrize("name", SETTINGS)
def test_figures_of_other_settings_are_not_compared(tmp_path: Path, name: str) -> None:
    old = write(tmp_path / "old.json", [endtoend("auto", 2.0)], settings={name: 1})
    new = write(tmp_path / "new.json", [endtoend("auto", 1.0)], settings={name: 2})
    with pytest.raises(FlashSpecError, match=rf"new\.json differ in {name}, 1 and 2: compare results of the same"):
        compare(old, new)


def test_figures_over_other_prompts_are_not_compared(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", [endtoend("auto", 2.0)])
    new = write(tmp_path / "new.json", [endtoend("auto", 1.0) | {"n": 5}])
    with pytest.raises(FlashSpecError, match="differ in answers a row, 8 and 5"):
        compare(old, new)


@pytest.mark.parametrize(
    "rows, more, sentence",
    [
        ([endtoend("other", 1.0)], {}, "have no row in common: rows are told apart by prompts, method, batch_size"),
        (
            [endtoend("auto", 1.0)] * 2,
            {},
            r"new\.json has two rows 'set auto 1': rows are told apart by prompts, method",
        ),
        ([{"kernel": "x"}], {}, "holds endtoend and .* holds kernels: compare results of one benchmark"),
        ([], {"kind": "dance"}, "holds 'dance', this version knows endtoend"),
        (
            [endtoend("auto", 1.0)],
            {"settings": {"target": "b"}},
            "differ in target, None and b: compare results of the same settings",
        ),
        ("none", {}, "is no benchmark result"),
    ],
)
def test_files_that_do_not_match_are_one_sentence(tmp_path: Path, rows: Any, more: Any, sentence: str) -> None:
    old = write(tmp_path / "old.json", [endtoend("auto", 1.0)])
    new = write(tmp_path / "new.json", rows, **more)
    with pytest.raises(FlashSpecError, match=sentence):
        compare(old, new)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(FlashSpecError, match=r"bad\.json cannot be read as JSON"):
        compare(tmp_path / "bad.json", tmp_path / "bad.json")
