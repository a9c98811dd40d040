"""How weights are cut: measured once, remembered on disk, guessed where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashspec.kernels import tiling


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(tiling, "_chosen", {})


def weight(outputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(outputs, 128, dtype=dtype)


def never(*_: object) -> float:
    raise AssertionError("nothing should be measured")


def test_the_fastest_cut_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    best = tiling.CANDIDATES[3]
    monkeypatch.setattr(tiling, "_seconds", lambda run: run())
    tiling.choose(weight(), False, lambda: 1.0 if tiling.tiling_of(weight()) == best else 2.0)
    assert tiling.tiling_of(weight()) == best
    monkeypatch.setattr(tiling, "_seconds", never)
    tiling.choose(weight(), False, never)  # known in this process
    monkeypatch.setattr(tiling, "_chosen", {})
    tiling.choose(weight(), False, never)  # known on disk
    assert tiling.tiling_of(weight()) == best


def test_a_shape_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_seconds", lambda run: run())
    tiling.choose(weight(), False, lambda: 1.0 if tiling.tiling_of(weight()) == tiling.CANDIDATES[4] else 2.0)
    assert tiling.tiling_of(weight(80)) == tiling.guess(weight(80))
    assert tiling.tiling_of(weight(), gated=True) == tiling.guess(weight(), gated=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}'])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tilings.json").write_text(content)
    monkeypatch.setattr(tiling, "_seconds", lambda run: run())
    tiling.choose(weight(), False, lambda: float(tiling.tiling_of(weight()).rows))
    assert tiling.tiling_of(weight()).rows == min(cut.rows for cut in tiling.CANDIDATES)


def test_float32_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_seconds", never)
    tiling.choose(weight(dtype=torch.float32), False, never)
    assert tiling.tiling_of(weight(dtype=torch.float32)).strands == 1


@pytest.mark.parametrize(
    ("outputs", "gated"), [(576, False), (2048, False), (4096, False), (128256, False), (28672, True)]
)
def test_a_guess_is_one_of_the_candidates(outputs: int, gated: bool) -> None:
    assert tiling.guess(torch.zeros(outputs, 16, dtype=torch.bfloat16), gated) in tiling.CANDIDATES
