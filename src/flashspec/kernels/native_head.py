"""The one layer of an EAGLE-3 head on a CPU, in one call of the native library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flashspec.kernels.native import BLOCK, NativeLayer, NativeLayers, NativeShape


class NativeHead(NativeLayers):
    """A decoder layer whose q, k and v, (rows, 2 H), read a token's embedding and a hidden state side by side, the
    first normed by attention_norm and the second by hidden_norm (H,). H is a multiple of 32."""

    def __init__(self, shape: NativeShape, layer: NativeLayer, hidden_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
        super().__init__(shape, [layer], 2 * shape.hidden_size, cos, sin)
        if shape.hidden_size % BLOCK:
            raise ValueError(f"hidden_size should be a multiple of {BLOCK}: got {shape.hidden_size}")
        self._hidden_norm = self._floats("hidden_norm", hidden_norm, (shape.hidden_size,))

    def extend(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, keys: Tensor, values: Tensor, bound: int
    ) -> Tensor:
        """The hidden states (B, H) that the layer makes of the last positions; `hidden` is its residual stream.

        embedded, hidden: (B, Q, H) float32. positions: (B, Q) int64. keys, values: (1, B, kv_heads, capacity,
        head_dim) float32, contiguous, which take all positions. bound: above every position; ValueError otherwise.
        """
        size = (*positions.shape, self.shape.hidden_size)
        for name, rows in (("embedded", embedded), ("hidden", hidden)):
            if rows.shape != size or rows.dtype != torch.float32:
                raise ValueError(f"{name} should be {size} float32: got {tuple(rows.shape)} {rows.dtype}")
        self._check_places(keys, values, len(positions), bound)
        if keys.dtype != torch.float32 or positions.dtype != torch.int64:
            raise ValueError(f"keys should be float32 and positions int64: got {keys.dtype} and {positions.dtype}")
        embedded, hidden, positions = embedded.contiguous(), hidden.contiguous(), positions.contiguous()
        out = torch.empty(len(positions), self.shape.hidden_size)
        fault = self._library.flashspec_head(
            ctypes.byref(self._model),
            self._hidden_norm,
            embedded.data_ptr(),
            hidden.data_ptr(),
            positions.data_ptr(),
            *positions.shape,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[3],
            bound,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        self._check_fault(fault, positions, bound)
        return out
