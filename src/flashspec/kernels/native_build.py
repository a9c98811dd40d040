"""The native library: C++ compiled at first use with the user's compiler, kept in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from flashspec.cache import cache_dir

PARTS = ("", "_weights", "_vectors", "_head", "_verify", "_choose", "_step")
SOURCES = tuple(Path(__file__).with_name(f"native{part}.cpp") for part in PARTS)


def available() -> bool:
    """Whether a compiler was found and the library built and loaded. The first call builds it; where it cannot, a
    warning says why, and nothing is raised."""
    return not why_not()


def why_not() -> str:
    """One sentence that says why the library is not there; '' where it is."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """RuntimeError with `why_not()` where `available()` is False."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = f"the native CPU kernel could not be built or loaded: {str(error).rstrip('.')}"
        warnings.warn(f"{reason}; plain PyTorch runs, which is slower", RuntimeWarning, stacklevel=2)
        return None, reason
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.flashspec_forward.argtypes = (
        [pointer] * 3 + [integer] * 3 + [pointer] * 2 + [integer] * 3 + [pointer] * 2 + [integer, pointer, integer]
    )
    loaded.flashspec_head.argtypes = [pointer] * 5 + [integer] * 2 + [pointer] * 2 + [integer] * 2 + [pointer, integer]
    loaded.flashspec_product.argtypes = [pointer, pointer, ctypes.c_double, pointer, integer, pointer, integer]
    loaded.flashspec_verify.argtypes = [pointer, integer]
    loaded.flashspec_gumbel.argtypes = [pointer] * 2 + [integer] * 4 + [pointer]
    loaded.flashspec_choose.argtypes = [pointer, integer]
    loaded.flashspec_commit.argtypes = [pointer]
    loaded.flashspec_window.argtypes = [pointer] * 3 + [integer] * 4 + [pointer] * 3
    for name in ("verify", "gumbel", "choose", "commit", "window"):
        getattr(loaded, f"flashspec_{name}").restype = None
    return loaded, ""


def _build() -> Path:
    """The library's path in the cache folder, compiled if it is not there yet."""
    compiler = _compiler()
    architecture = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, "-std=c++17", "-O3", architecture, "-fno-math-errno", "-ffp-contract=fast", "-w"]
    command += ["-shared", "-fPIC", str(SOURCES[0])]
    # The thread pool that torch already runs: a second one would spin against it on the same cores.
    pool = list(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))
    threaded = [*command, "-fopenmp", *(["-Wl,--as-needed", *pool] if pool else [])]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*(source.read_text() for source in SOURCES), *threaded, version, _cpu()]
    target = cache_dir() / f"native-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        if _compile([*threaded, "-o", str(temporary)]):  # a compiler without OpenMP gives one thread
            reason = _compile([*command, "-o", str(temporary)])
            if reason:
                raise RuntimeError(f"{' '.join(compiler)} failed: {reason}")
        os.replace(temporary, target)
    return target


def _compile(command: list[str]) -> str:
    """'' or the first error."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = result.stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1]) if result.returncode else ""


def _compiler() -> list[str]:
    named = os.environ.get("CXX", "").split()
    for command in ([named] if named else []) + [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError("there is no C++ compiler (set CXX, or install g++ or clang++)")


def _cpu() -> str:
    """Names the processor: what the compiler's `native` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))
