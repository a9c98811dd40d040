"""`flashspec bench`, from a command line to a benchmark's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashspec.bench.shapes import DRAFTER_SHAPES, SHAPES
from flashspec.bench.steps import BASELINES, Plan
from flashspec.cli import bench as cli
from flashspec.cli.main import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("endtoend", "kernels", "steps"):
        monkeypatch.setattr(f"flashspec.bench.{name}.run", lambda **options: found.update(options))
    monkeypatch.setattr("flashspec.bench.report.table", lambda result: "a table")
    return found


def test_kernels(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--quick", "--kernel", "verify_logits"]) == 0
    assert asked.pop("progress") is not None
    assert asked == {"quick": True, "kernels": ("verify_logits",)}
    assert capsys.readouterr().out == "a table\n"


def test_steps(asked: dict[str, Any]) -> None:
    options = ["--shape", "8b", "--random", "--widths", "1,5", "--batch-size", "1, 8", "--arms", "", "--context", "512"]
    options += ["--drafter", "heads/eagle3", "--drafter", "heads/medusa"]
    assert run(["bench", "steps", *options, "--drafter-sizes", "30m", "--baselines", "transformers-graph"]) == 0
    assert asked["drafters"] == ("heads/eagle3", "heads/medusa")
    assert asked["plan"] == Plan([1, 5], [1, 8], [], ["30m"], ["transformers-graph"])
    assert (asked["shape"], asked["random"], asked["context"]) == ("8b", True, 512)


def test_endtoend_takes_shapes_and_batch_sizes(asked: dict[str, Any]) -> None:
    assert run(["bench", "endtoend", "--shape", "1b", "--device", "cuda", "--batch-size", "1,4"]) == 0
    assert (asked["shape"], asked["device"], asked["batch_sizes"]) == ("1b", "cuda", [1, 4])


def test_the_options_know_what_the_benchmarks_know() -> None:
    """The command line spells it out, as it must not import torch to print its help."""
    options = {option.name: option for option in cli.bench.commands["steps"].params}
    assert list(options["shape"].type.choices) == list(SHAPES)
    assert options["arms"].default.split(",") == list(Plan().arms)
    assert options["widths"].default == ",".join(map(str, Plan().widths))
    assert all(name in options["baselines"].help for name in BASELINES)
    assert ",".join(DRAFTER_SHAPES) in options["drafter_sizes"].help


@pytest.mark.parametrize("value", ["0", "one", "1,-2"])
def test_bad_batch_sizes_are_one_sentence(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "endtoend", "--batch-size", value]) == 2
    assert "should be numbers from 1 up, such as 1,4,16" in capsys.readouterr().err


def test_compare_ends_with_status_1_where_a_row_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, methods in zip(paths, (["plain", "auto"], ["plain"]), strict=True):
        rows = [{"prompts": "set", "method": method, "tokens_per_second": 9.0} for method in methods]
        path.write_text(json.dumps({"provenance": {"hardware": {"gpu": "A"}}, "rows": rows}))
    assert run(["bench", "compare", *map(str, paths)]) == 1
    assert f"{paths[1]} lacks 1 things that {paths[0]} has: set auto 1\n" in capsys.readouterr().err
    assert run(["bench", "compare", *map(str, reversed(paths))]) == 0


def test_compare_ends_with_status_1_where_something_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for path, speed in zip(paths, (100.0, 90.0), strict=True):
        rows = [{"prompts": "set", "method": "auto", "tokens_per_second": speed}]
        Path(path).write_text(json.dumps({"provenance": {"hardware": {"gpu": "A"}}, "rows": rows}))
    assert run(["bench", "compare", *paths]) == 1
    out, err = capsys.readouterr()
    assert (
        err == "flashspec: 1 of 1 figures fell, by more than 5% or, of the same text, at all\n" and "0.900 fell" in out
    )
    assert run(["bench", "compare", *paths, "--tolerance", "0.2"]) == 0
    assert capsys.readouterr().out == "1 figures, ? to ?, the same hardware: none fell\n"
