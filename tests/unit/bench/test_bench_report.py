from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flashspec.bench import plots, provenance, report

ORIGIN = {
    "hardware": {"gpu": "NVIDIA H200"},
    "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    "date": "2026-11-22T01:02:03+00:00",
}


def result(kind: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "provenance": ORIGIN, "settings": settings, "rows": rows}


KERNELS = result(
    "kernels",
    [
        {"kernel": "verify_logits", "microseconds": 10.0, "bytes": 10**6, "tb_per_second": 0.1, "dtype": "float32"},
        {"kernel": "verify_tokens", "microseconds": 2.04, "dtype": "float32", "speedup_vs_pytorch": 3.0},
    ],
    copy_tb_per_second=4.3,
)


def test_columns_that_no_row_fills_are_left_out() -> None:
    columns, rows = report.cells(KERNELS)
    assert [column.heading for column in columns] == ["kernel", "dtype", "µs", "TB/s", "vs PyTorch"]
    assert rows[1] == ["verify_tokens", "float32", "2.0", "", "3.0x"]


def test_markdown_says_where_its_numbers_come_from() -> None:
    lines = report.markdown(KERNELS).splitlines()
    assert lines[0] == "| kernel | dtype | µs | TB/s | vs PyTorch |"
    assert lines[1] == "|---|---|---:|---:|---:|"
    assert lines[-1] == "copies at 4.3 TB/s; NVIDIA H200; torch 2.11.0, transformers 5.17.0; 2026-11-22."


@pytest.mark.parametrize("batch_sizes", [[1], [1, 4]])
def test_throughput_by_batch_size(tmp_path: Path, batch_sizes: list[int]) -> None:
    rows = [
        {"prompts": "set", "method": method, "batch_size": size, "n": 8, "tokens_per_second": 10.0 * size}
        | {"speedup_vs_plain": 1.0, "speedup_vs_hf": None, "same_text_as_hf_float32": None, "arms": []}
        for method in ("plain", "auto")
        for size in batch_sizes
    ]
    found = result("endtoend", rows, target="small", max_new_tokens=8, temperature=0.0)
    report.write(found, tmp_path / "found.json")
    assert (tmp_path / "found.png").exists()
    lines = report.markdown(found).splitlines()
    assert len(lines) == 6 and lines[2].startswith("| plain | 10.0, 1.00×")
    assert ("set, batch 4" in lines[0]) is (len(batch_sizes) > 1)
    assert "arms" not in (tmp_path / "found.csv").read_text()


def test_shares_by_position_are_cut_in_tables_and_whole_in_files(tmp_path: Path) -> None:
    row = {"method": "eagle3:6", "prompts": "set", "n": 1, "tokens_per_second": 1.0, "arms": []}
    shares = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    found = result("endtoend", [row | {"acceptance_per_position": shares}], target="small", max_new_tokens=8)
    columns, rows = report.cells(found)
    assert [column.heading for column in columns][-1] == "accepted by position"
    assert rows[0][-1] == "0.90 0.80 0.70 0.60 0.50 …"
    report.write(found, tmp_path / "found.json")
    assert "0.9 0.8 0.7 0.6 0.5 0.4" in (tmp_path / "found.csv").read_text()


def test_a_terminal_of_80_columns_shows_every_name_and_figure_whole() -> None:
    names = ("hf-float32", "hf-bfloat16", "plain", "thompson@arms")
    measured = {
        "tokens_per_second": 0.0,
        "acceptance_length": 2.0,
        "acceptance_per_position": [0.9, 0.8, 0.7, 0.6, 0.5],
    }
    ratios = {"speedup_vs_plain": 1.5, "speedup_vs_hf": 7.25, "same_text_as_hf_float32": 1.0, "same_text_as_plain": 0.5}
    rows = [
        {"method": name, "prompts": "humaneval", "n": 2, **measured, **ratios}
        | {"tokens_per_second": 1234.5 + index, "acceptance_length": 1.5 + index, "speedup_vs_plain": 1.5 + index}
        | {"speedup_vs_hf": 7.25 + index, "same_text_as_plain": index / 3}
        for index, name in enumerate(names)
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report.table(result("endtoend", rows, target="small", max_new_tokens=8)))
    shown = console.export_text()
    assert "…" not in shown and shown.splitlines()[-2].split()[:2] == ["thompson@arms", "1237.5"]
    assert "prompts humaneval" in shown and "same text 100%" in shown  # in the title, as no row differs
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_no_rows_no_plot(tmp_path: Path) -> None:
    plots.draw("kernels", result("kernels", [], copy_tb_per_second=1.0), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.draw("kernels", KERNELS, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_outside_a_checkout_the_environment_knows_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("FLASHSPEC_COMMIT", "abc")
    assert provenance.provenance("cpu")["commit"] == "abc"


def test_the_command_names_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.sys, "argv", ["/opt/bin/flashspec", "bench", "--output", "/home/a/x.json", "b/c"])
    assert provenance.provenance("cpu")["command"] == "flashspec bench --output x.json b/c"


def test_a_gpu_has_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 150_000_000_000})()
    monkeypatch.setattr(provenance.torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(provenance, "_output", lambda command, folder=None: "580.159.04\n580.159.04")
    hardware = provenance.provenance("cuda:0")["hardware"]
    assert (hardware["gpu"], hardware["memory_gb"], hardware["driver"]) == ("NVIDIA H200", 150.0, "580.159.04")

    def missing(command: list[str], folder: Path | None = None) -> str:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(provenance, "_output", missing)
    assert provenance.provenance("cuda:0")["hardware"]["driver"] is None
