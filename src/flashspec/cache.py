"""Where FlashSpec keeps what it fetched, converted or compiled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from flashspec.core import FlashSpecError


def cache_dir() -> Path:
    """FLASHSPEC_CACHE, else XDG_CACHE_HOME/flashspec, else ~/.cache/flashspec; it may not exist yet."""
    if own := os.environ.get("FLASHSPEC_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "flashspec"


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `build` where it is missing or no longer what was built; never seen half done.

    FlashSpecError where the cache cannot be written."""
    target = cache_dir() / "models" / name
    if _matches_manifest(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            build(folder)
            manifest = {file.name: _mark(file) for file in folder.iterdir()}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(folder, target)
    except OSError as error:
        if not _matches_manifest(target):  # another process may have built it in the meantime
            raise cannot_write(target, error) from None
    return target


def cannot_write(path: Path, error: OSError) -> FlashSpecError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return FlashSpecError(f"cannot write to the cache {path} ({reason}): free some space or set FLASHSPEC_CACHE")


def _matches_manifest(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(_mark(folder / name) == mark for name, mark in manifest.items())
    except (OSError, ValueError):
        return False


def _mark(file: Path) -> str:
    """Size, and hash of the first 16 MiB: all of a tokenizer, enough of the weights."""
    with file.open("rb") as content:
        return f"{file.stat().st_size} {hashlib.sha256(content.read(16 << 20)).hexdigest()}"
