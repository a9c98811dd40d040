"""Where a number comes from: hardware, driver, versions, commit, command, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashspec import __version__

PACKAGES = ("torch", "transformers", "triton", "flashinfer-python", "tokenizers", "numpy")


def provenance(device: str) -> dict[str, Any]:
    return {
        "hardware": _hardware(device),
        "versions": {"flashspec": __version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": " ".join(_without_folder(word) for word in sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _without_folder(word: str) -> str:
    """An absolute path says more about a machine than about a measurement."""
    return Path(word).name if word.startswith("/") else word


def _hardware(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 1e9, 1)
        return {"gpu": properties.name, "memory_gb": memory, "driver": _driver(), "cuda": torch.version.cuda}
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "flags": _cpu_flags()}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return _output(query).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return [flag for flag in known if flag in _cpu_info("flags").split()]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """What FLASHSPEC_COMMIT says, else the source tree's commit, with '+' where files differ from it."""
    if named := os.environ.get("FLASHSPEC_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        commit = _output(["git", "rev-parse", "HEAD"], here)
        return commit + ("+" if _output(["git", "status", "--porcelain", "--untracked-files=no"], here) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _output(command: list[str], folder: Path | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
