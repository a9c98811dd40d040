"""Where the Triton kernels run, by what a GPU says of itself."""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import flashspec.kernels
from flashspec.kernels import decoding, device

GPU = torch.device("cuda", 0)
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable.\nOr else."


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that they run on, until a test says otherwise."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toaster")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device, "TRITON_AVAILABLE", True)
    monkeypatch.setattr(device, "_launch", lambda device: None)
    monkeypatch.setattr(device, "shared_memory", lambda device: 226 << 10)
    device.usable.cache_clear()
    yield
    device.usable.cache_clear()


def raising(error: Exception) -> Callable[[torch.device], None]:
    def launch(device: torch.device) -> None:
        raise error

    return launch


@pytest.mark.filterwarnings("error")
def test_they_run_on_a_gpu_and_not_on_a_cpu() -> None:
    assert decoding.available(GPU) and flashspec.kernels._use_triton(GPU)
    assert not decoding.available(torch.device("cpu")) and not flashspec.kernels._use_triton(torch.device("cpu"))


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (torch.cuda, "get_device_capability", lambda device: (7, 5), "Toaster has compute capability 7.5, below 8.0"),
        (torch.version, "hip", "6.4", "the kernels are for GPUs of NVIDIA, not for Toaster"),
        (device, "TRITON_AVAILABLE", False, "Triton is not installed"),
        (
            device,
            "_launch",
            raising(RuntimeError(NO_COMPILER)),
            f"Triton cannot compile for Toaster ({NO_COMPILER[:-9]})",
        ),
        (
            device,
            "_launch",
            raising(subprocess.CalledProcessError(1, ["gcc", "main.c"])),
            "Triton cannot compile for Toaster (Command '['gcc', 'main.c']' returned non-zero exit status 1.)",
        ),
    ],
)
def test_where_they_do_not_run_both_doors_are_shut_and_one_warning_says_why(
    place: object, name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, value)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not decoding.available(GPU) and not flashspec.kernels._use_triton(GPU)
    assert [str(each.message) for each in told] == [f"{reason}: plain PyTorch runs, which is slower"]
    assert told[0].category is RuntimeWarning  # others the command line hides


def test_full_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(device, "_launch", raising(torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            device.usable(GPU)
    assert device.usable(GPU)


class Kernel:
    """As Triton returns it from a launch."""

    def __init__(self, function: int) -> None:
        self.function = function


def test_the_driver_is_told_once_a_kernel_how_to_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int | None, int, int]] = []
    driver = SimpleNamespace(cuFuncSetAttribute=lambda function, *what: told.append((function.value, *what)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    device._leave_l1.cache_clear()
    first, second, in_its_place = Kernel(7), Kernel(8), Kernel(7)
    for kernel in (first, second, first, in_its_place, None):  # None: of Triton's interpreter
        device.leave_l1(kernel, GPU)
    device._leave_l1.cache_clear()
    assert told == [(7, 9, 25), (8, 9, 25), (7, 9, 25)]


def test_without_the_drivers_library_the_hint_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    device.leave_l1(Kernel(9), GPU)
    device._leave_l1.cache_clear()


def test_a_gpu_with_little_shared_memory_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "shared_memory", lambda device: 98 << 10)
    monkeypatch.setattr(device, "_leave_l1", lambda kernel: pytest.fail("asked"))
    device.leave_l1(Kernel(9), GPU)
