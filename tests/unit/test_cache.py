from __future__ import annotations

from pathlib import Path

import pytest

from flashspec.cache import cache_dir


def test_own_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.setenv("FLASHSPEC_CACHE", "~/own")
    assert cache_dir() == Path("/home/someone/own")
    monkeypatch.setenv("FLASHSPEC_CACHE", "")
    assert cache_dir() == Path("/shared/flashspec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/someone/.cache/flashspec")
