"""Which devices the Triton kernels run on, and what they ask of one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import torch

TRITON_AVAILABLE = find_spec("triton") is not None
CARVEOUT, SHARED_PERCENT = 9, 25  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of CUDA's driver, and its value


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether the device is a GPU that the kernels run on; where one is not, a warning says why, once."""
    reason = _why_not(device) if device.type == "cuda" else ""
    if reason:
        warnings.warn(f"{reason}: plain PyTorch runs, which is slower", RuntimeWarning, stacklevel=2)
    return device.type == "cuda" and not reason


def _why_not(device: torch.device) -> str:
    """'' where they run."""
    if not TRITON_AVAILABLE:
        return "Triton is not installed"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return f"the kernels are for GPUs of NVIDIA, not for {name}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{name} has compute capability {'.'.join(map(str, capability))}, below 8.0"
    try:
        _launch(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anything: no C compiler, no Python.h, no room for a cache, a GPU newer than Triton
        return f"Triton cannot compile for {name} ({str(error).partition(chr(10))[0]})"
    return ""


def _launch(device: torch.device) -> None:
    """A small kernel: Triton compiles its launcher in C at the first one."""
    from flashspec.kernels.gather import gather_accepted

    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    gather_accepted(one, one[0])


@functools.cache
def overlapped(device: torch.device) -> dict[str, bool]:
    """The options of a launch that may begin while the one before it ends: compute capability 9.0 and up."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may use."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 1024  # type: ignore[attr-defined]


def leave_l1(launched: Any, device: torch.device) -> None:
    """Ask the driver to run a kernel, as Triton returned it from a launch, with most of a multiprocessor's memory as L1
    cache, where loads under way need room. Not asked, it may keep what the kernel before had, such as a product that
    fills shared memory: five tokens of an 8B model take 3 % longer then, nine 5 %. Where a quarter is little, nothing
    is asked for."""
    if getattr(launched, "function", None) is not None and shared_memory(device) > 200 << 10:
        _leave_l1(launched)


@functools.cache
def _leave_l1(launched: Any) -> None:
    """Once a kernel, which is kept: where one was unloaded the driver may put another, which would not be asked for."""
    with contextlib.suppress(OSError):  # it is a hint
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuFuncSetAttribute(ctypes.c_void_p(launched.function), CARVEOUT, SHARED_PERCENT)
