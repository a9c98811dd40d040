"""Where a number comes from: hardware, versions, commit, command, date."""

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

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy")


def provenance(device: str) -> dict[str, Any]:
    return {
        "hardware": _hardware(device),
        "versions": {"flashspec": __version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": " ".join(["flashspec", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hardware(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return {"gpu": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "flags": _cpu_flags()}


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
    """The source tree's commit, with '+' where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
