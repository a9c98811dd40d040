"""Which devices the Triton kernels run on."""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec

import torch

TRITON_AVAILABLE = find_spec("triton") is not None


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
