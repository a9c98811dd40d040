"""What lies in the cache is whole, or built again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashspec.cache import cache_dir, cached_folder
from flashspec.core import FlashSpecError


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path))
    return []


def get(builds: list[Path]) -> Path:
    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "content").write_text("whole")

    return cached_folder("thing", build)


def test_a_folder_is_built_once_and_again_when_damaged(builds: list[Path]) -> None:
    folder = get(builds)
    assert get(builds) == folder and len(builds) == 1
    for damaged in ("content", "manifest.json"):
        (folder / damaged).write_text("whol")
        assert (get(builds) / "content").read_text() == "whole"
    (folder / "content").unlink()
    get(builds)
    assert len(builds) == 4 and not builds[0].exists()


def test_a_build_that_fails_leaves_nothing(builds: list[Path]) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(FlashSpecError, match="the disk is full"):
        cached_folder("thing", fail)
    assert list((cache_dir() / "models").iterdir()) == []


def test_two_processes_may_build_at_once(builds: list[Path]) -> None:
    def build(folder: Path) -> None:
        get(builds)
        raise OSError("the other one was first")

    assert (cached_folder("thing", build) / "content").read_text() == "whole"
