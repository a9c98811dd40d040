"""What stands around the benchmarks: scripts for a GPU, and `make`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_heads import LAYERS, VOCAB, write_eagle, write_medusa
from small_models import llama

from flashspec.bench import steps
from flashspec.bench.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[3]


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measure_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, measuring a CPU by the clock, in a hurry."""
    module = script("measure_gpu")
    run, here = steps.run, {"device": "cpu", "dtype": "float32", "context": 64, "new_tokens": 8, "replays": 1}
    monkeypatch.setattr(steps, "run", lambda *arguments, **options: run(*arguments, **options | here | {"calls": 1}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA ABC 1")
    monkeypatch.setitem(steps.COPY_ELEMENTS, "cpu", 2**10)
    monkeypatch.setitem(SHAPES, "8b", Shape("8B", 192, 224, 12, 3, 32, LAYERS + 1, 320))
    return module


@pytest.mark.parametrize("part", ["steps-heads-8b", "steps-heads-135m"])
def test_what_each_head_takes_to_draft(measure_gpu: ModuleType, part: str, tmp_path: Path) -> None:
    llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=128).bfloat16().save_pretrained(tmp_path / "target")
    heads = [str(write_eagle(tmp_path / "one")), str(write_medusa(tmp_path / "two"))]
    parts = measure_gpu.make_parts(str(tmp_path / "target"), tmp_path, tmp_path, heads, 1)
    rows: list[dict[str, Any]] = parts[part]()["rows"]
    drafts = [row["arm"] for row in rows if row["part"] == "draft" and row["microseconds"] > 0]
    assert drafts == ["eagle3:4", "eagle3:6", "medusa:4"]
    assert [row["arm"] for row in rows if row["part"] == "step"] == ["plain", *drafts]
    assert (tmp_path / f"{part}-abc-1.json").exists()


def test_every_head_of_the_package_has_arms(measure_gpu: ModuleType) -> None:
    from flashspec.drafters.shipped import FOLDER

    assert {folder.name.rpartition("-")[2] for folder in FOLDER.iterdir()} == set(measure_gpu.SHIPPED)
    assert set(measure_gpu.SHIPPED) <= set(measure_gpu.HEADS)


@pytest.mark.parametrize(
    ("spans", "busy", "gaps"),
    [
        ([(0, 5)], 5, []),
        ([(7, 9), (0, 5)], 7, [2]),
        ([(0, 5), (1, 2), (4, 6), (6, 8)], 8, []),
        ([(0, 10), (2, 3), (12, 13), (20, 21)], 12, [2, 7]),
    ],
)
def test_kernels_that_overlap_are_busy_once(spans: list[tuple[float, float]], busy: float, gaps: list[float]) -> None:
    assert script("measure_gpu_gaps").idle(spans) == (busy, gaps)


@pytest.mark.skipif(torch.cuda.is_available() or not shutil.which("make"), reason="there is a GPU, or no make")
def test_the_gpus_tests_without_a_gpu_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    found = subprocess.run(["make", "test-gpu", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode != 0 and "no tests ran" not in found.stdout
    assert found.stderr.startswith("make test-gpu needs a CUDA device, and torch")
