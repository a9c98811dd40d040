"""What the door asks of its arguments; ValueError names the one that does not fit."""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} should have shape {tuple(shape)}: got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} should be {' or '.join(map(str, dtypes))}: got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} should be on {device}: got {tensor.device}")


def check_written(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is written in place and should be contiguous: got strides {tensor.stride()}")


def check_counter(seeds: Tensor, positions: Tensor, purpose: int) -> None:
    if positions.dim() != 2:
        raise ValueError(f"positions should be (B, Q): got shape {tuple(positions.shape)}")
    check("positions", positions, tuple(positions.shape), (torch.int64,), positions.device)
    check("seeds", seeds, tuple(positions.shape[:1]), (torch.int64,), positions.device)
    if not 0 <= purpose < 2**32:
        raise ValueError(f"purpose should be in [0, 2^32): got {purpose}")


def check_ids_on_cpu(token_ids: Tensor, logprobs: Tensor) -> None:
    """A CPU's gather looks at every id itself, without the read-back that fake tensors forbid."""
    if token_ids.device.type == "cpu":
        try:
            logprobs.gather(2, token_ids.unsqueeze(2))
        except RuntimeError as error:
            raise ValueError(f"draft_token_ids should be in [0, {logprobs.shape[2]}): {error}") from None
