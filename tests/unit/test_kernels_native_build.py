"""The library and torch in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashspec.kernels import native_build

COUNT_THREADS = """
import os
import torch
from flashspec.kernels.native import PackedLinear, PackedMatrix

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
before = threads()
torch.ones(100_000).exp()
product = PackedLinear(PackedMatrix.quantised(torch.ones(64, 64)))
with_torch = threads()
product(torch.ones(1, 64))
print(with_torch - before, threads() - with_torch)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""


@pytest.mark.skipif(not native_build.available(), reason=native_build.why_not() or "built")
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_torch_and_the_library_share_one_thread_pool() -> None:
    """Two would spin against each other on the same cores: an eagle3 step takes 1.5 times as long."""
    bundled = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not bundled:
        pytest.skip("this torch brings no libgomp")
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["1 0", str(bundled[0])], done.stderr
