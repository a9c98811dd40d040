import pytest
import torch

from flashspec.kernels import TRITON_AVAILABLE

# Triton decides where a kernel is decorated whether to interpret it. Without a GPU ours are interpreted; the
# variable is gone afterwards, so that CPU tensors still go to the twins.
if TRITON_AVAILABLE and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import flashspec.kernels.append
        import flashspec.kernels.attention
        import flashspec.kernels.choose
        import flashspec.kernels.cut
        import flashspec.kernels.elementwise
        import flashspec.kernels.fused
        import flashspec.kernels.gather
        import flashspec.kernels.linear
        import flashspec.kernels.lookup
        import flashspec.kernels.noise
        import flashspec.kernels.recording
        import flashspec.kernels.score
        import flashspec.kernels.verify  # noqa: F401
