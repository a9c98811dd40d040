import pytest
import torch

from flashspec.kernels import TRITON_AVAILABLE

# Triton decides where a kernel is decorated whether to interpret it. Without a GPU ours are interpreted; the
# variable is gone afterwards, so that CPU tensors still go to the twins.
if TRITON_AVAILABLE and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import flashspec.kernels.fused
        import flashspec.kernels.gather
        import flashspec.kernels.noise
        import flashspec.kernels.verify  # noqa: F401
