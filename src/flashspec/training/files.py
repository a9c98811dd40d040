"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flashspec.core import FlashSpecError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".unfinished"


def write_whole(path: Path, content: bytes) -> None:
    """Whoever is killed in the middle of it leaves what was there before. FlashSpecError where the disk is full."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=SCRATCH, delete=False) as file:
            scratch = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        os.replace(scratch, path)
        _sync(path.parent)
    except OSError as error:
        if scratch is not None:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
        full = error.errno == errno.ENOSPC
        reason, advice = error.strerror or str(error), "what was there before is intact"
        if full:
            reason, advice = "the disk is full", f"make room and go on with --resume; {advice}"
        raise FlashSpecError(f"cannot write {path} ({reason}): {advice}") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """FlashSpecError while another process is within for the same folder, where the system can tell."""
    made = [place for place in (folder, folder.parent) if not place.exists()]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlashSpecError(f"another training is at work in {folder.parent}: choose another --out") from None
        except OSError:
            pass  # of a file system that knows no locks
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def clear_scratch(folder: Path) -> None:
    """Drop what a kill left half written."""
    for path in folder.rglob(f".*{SCRATCH}"):
        with suppress(OSError):
            path.unlink()


def _sync(folder: Path) -> None:
    """A rename is safe from a power cut only when its folder is on the disk."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """notes: JSON beside the tensors, in the same file so that the two never disagree."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(stored, {"notes": json.dumps(notes or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. FlashSpecError where the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            notes: dict[str, Any] = json.loads((file.metadata() or {}).get("notes", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError, ValueError) as error:
        raise FlashSpecError(f"{path} cannot be read ({error}): delete it, or train into another --out") from None
