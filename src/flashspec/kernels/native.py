"""A whole decoder forward on a CPU in one C++ file, built at first use with the user's compiler.

A decoding step reads every weight once, so its time is the weights' bytes over the memory's bandwidth: weights stay
packed as they are stored, activations and sums are float32. A token's result does not depend on the tokens that share
its call, bit for bit, so that verification agrees with plain decoding.
B rows, Q positions, H hidden size, V vocabulary entries, N output features, K input features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels.native_build import library

PANEL, GROUP, BLOCK = 32, 16, 32  # as in the source
FORMATS = ("f32", "bf16", "q8_0", "q4_1", "q4_0")  # in the order of the source's tables
GGUF_BLOCK_BYTES = {"q8_0": 34, "q4_1": 20, "q4_0": 18}
NO_MEMORY = "no memory for the buffers of a native call"


@dataclass(frozen=True)
class PackedMatrix:
    """A weight (rows N, columns K) in the kernel's layout.

    data: uint8, (N / 32, K / 32, 2, bytes): panels of 32 rows by blocks of 32 columns, as two groups of 16 rows, one
    row a vector lane; N and K are padded with zeros. q8_0: scale * int8; q4_1: scale * (0..15) + least;
    q4_0: scale * (-8..7); scale and least are float16, one for 32 columns of a row.
    """

    data: Tensor
    rows: int
    columns: int
    format: str

    @classmethod
    def from_tensor(cls, weight: Tensor) -> PackedMatrix:
        """weight (N, K): bfloat16 stays as it is, float32 too, float16 becomes float32."""
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"weight should be (N, K) in float32, bfloat16 or float16: got {tuple(weight.shape)} {weight.dtype}"
            )
        rows, columns = weight.shape
        blocks = F.pad(weight.detach().cpu(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        if weight.dtype == torch.bfloat16:  # two columns share a 32-bit lane
            return cls(_pack(blocks.contiguous().view(torch.int32)), rows, columns, "bf16")
        return cls(_pack(blocks.float()), rows, columns, "f32")

    @classmethod
    def from_gguf(cls, blocks: Tensor, format: str) -> PackedMatrix:
        """blocks (N, bytes of a row) uint8, as a GGUF file holds them; format q8_0, q4_1 or q4_0."""
        size = GGUF_BLOCK_BYTES.get(format)
        if size is None:
            raise ValueError(f"format should be one of {', '.join(GGUF_BLOCK_BYTES)}: got {format!r}")
        if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % size:
            raise ValueError(
                f"blocks of {format} should be (N, a multiple of {size}) uint8: "
                f"got {tuple(blocks.shape)} {blocks.dtype}"
            )
        rows, columns = blocks.shape[0], blocks.shape[1] // size * BLOCK
        parts = blocks.reshape(rows, -1, size)  # (N, K / 32, size)
        scale_bytes = size - (32 if format == "q8_0" else 16)
        scales = parts[..., :scale_bytes].contiguous().view(torch.int16)
        values = parts[..., scale_bytes:].contiguous()
        if format != "q8_0":  # a byte holds columns j and j + 16; neighbours are to share one
            columns_of_block = torch.cat((values & 15, values >> 4), 2)
            values = columns_of_block[..., 0::2] | columns_of_block[..., 1::2] << 4
            values = values.view(torch.int32)  # a lane: eight neighbouring columns
        return cls(torch.cat((_pack(scales), _pack(values)), 3), rows, columns, format)

    @classmethod
    def quantised(cls, weight: Tensor) -> PackedMatrix:
        """weight (N, K) of any float dtype as q8_0: the largest entry of each 32 of a row is 127 steps from 0."""
        rows, columns = weight.shape
        blocks = F.pad(weight.detach().cpu().float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        scales = (blocks.abs().amax(2, keepdim=True) / 127).half()  # (N, K / 32, 1); of faults NaN or infinite
        steps = (blocks / scales.float()).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        return cls(torch.cat((_pack(scales.view(torch.int16)), _pack(steps)), 3), rows, columns, "q8_0")

    def dequantise(self) -> Tensor:
        """(N, K) float32, the values that the kernel computes with."""
        if self.format == "f32":
            weight = _unpack(self.data, torch.float32)
        elif self.format == "bf16":
            weight = _unpack(self.data, torch.int32).view(torch.bfloat16).float()
        elif self.format == "q8_0":
            scale = _unpack(self.data[..., :32], torch.float16).float()
            weight = scale * _unpack(self.data[..., 32:], torch.int8)
        else:
            scale_bytes = 64 if self.format == "q4_1" else 32
            scales = _unpack(self.data[..., :scale_bytes], torch.float16).float()  # (N, K / 32, 2 or 1)
            pairs = _unpack(self.data[..., scale_bytes:], torch.int32).view(torch.uint8)
            values = torch.stack((pairs & 15, pairs >> 4), 3).flatten(2).float()
            scale, least = scales[..., :1], scales[..., 1:] if self.format == "q4_1" else -8 * scales
            weight = scale * values + least
        return weight.flatten(1)[: self.rows, : self.columns].contiguous()


def _pack(values: Tensor) -> Tensor:
    """(N, K / 32, n) -> (N / 32, K / 32, 2, bytes) uint8: n vectors of 16 rows for each block."""
    padded = F.pad(values, (0, 0, 0, 0, 0, -values.shape[0] % PANEL))
    groups = padded.view(-1, 2, GROUP, *values.shape[1:])
    return groups.permute(0, 3, 1, 4, 2).contiguous().view(torch.uint8).flatten(3)


def _unpack(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: (N / 32, K / 32, 2, bytes) uint8 -> (N, K / 32, n) of dtype."""
    values = data.contiguous().view(dtype).view(*data.shape[:3], -1, GROUP)
    return values.permute(0, 2, 4, 1, 3).flatten(0, 2).contiguous()


@dataclass(frozen=True)
class NativeShape:
    """Sizes of a decoder. sliding_window: how many slots a position sees, itself included; None: all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_window: int | None = None


@dataclass(frozen=True)
class NativeLayer:
    """A decoder layer. Norms and biases are vectors of any float dtype; q_norm and k_norm have one entry a head dim."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q: PackedMatrix
    k: PackedMatrix
    v: PackedMatrix
    o: PackedMatrix
    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


_VECTORS = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias")
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_SIZES = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "sliding_window")


class _Layer(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _VECTORS) + tuple((name, _Matrix) for name in _MATRICES)


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("max_position", ctypes.c_int64),
        ("rms_norm_eps", ctypes.c_double),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("final_norm", "cos", "sin")),
        ("embedding", _Matrix),
    )


class PackedLinear:
    """x (..., K) float32 -> x W^T (..., N) float32 on this CPU; norm (K,) and eps: of x RMS-normed."""

    def __init__(self, weight: PackedMatrix, norm: Tensor | None = None, eps: float = 0.0) -> None:
        self._library, self._eps = library(), eps
        self._weight, self._matrix = weight, _structure(weight)
        self._norm = None if norm is None else norm.detach().to("cpu", torch.float32).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self._weight.rows, self._weight.columns
        if x.shape[-1] != columns or x.dtype != torch.float32:
            raise ValueError(f"hidden should be (..., {columns}) float32: got {tuple(x.shape)} {x.dtype}")
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], rows)
        fault = self._library.flashspec_product(
            ctypes.byref(self._matrix),
            None if self._norm is None else self._norm.data_ptr(),
            self._eps,
            x.data_ptr(),
            x.numel() // columns,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if fault:
            raise MemoryError(NO_MEMORY)
        return out


def _structure(matrix: PackedMatrix) -> _Matrix:
    return _Matrix(matrix.data.data_ptr(), matrix.rows, matrix.columns, FORMATS.index(matrix.format))


class NativeLayers:
    """Layers for the library, beside the tensors that its structures point to.

    inputs: how wide the rows are that q, k and v read. cos, sin: (max_position, head_dim) or (max_position,
    head_dim / 2). RuntimeError where `native_build.available()` is False.
    """

    def __init__(
        self, shape: NativeShape, layers: Sequence[NativeLayer], inputs: int, cos: Tensor, sin: Tensor
    ) -> None:
        self.shape = shape
        self._alive: list[Tensor] = []
        self._library = library()
        half = shape.head_dim // 2
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, mlp = shape.hidden_size, shape.intermediate_size
        if shape.head_dim % GROUP or shape.num_heads % shape.num_kv_heads or len(layers) != shape.num_layers:
            raise ValueError(
                "head_dim should be a multiple of 16, num_heads one of num_kv_heads and layers num_layers long: "
                f"got {shape} and {len(layers)} layers"
            )
        sizes = {"q": (q_size, inputs), "k": (kv_size, inputs), "v": (kv_size, inputs), "o": (hidden, q_size)}
        sizes |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        lengths = dict.fromkeys(("attention_norm", "mlp_norm", "o_bias"), hidden)
        lengths |= {"q_norm": shape.head_dim, "k_norm": shape.head_dim}
        lengths |= {"q_bias": q_size, "k_bias": kv_size, "v_bias": kv_size}
        packed = (_Layer * len(layers))()
        for to, layer in zip(packed, layers, strict=True):
            for name, size in sizes.items():
                setattr(to, name, self._matrix(name, getattr(layer, name), size))
            for name, length in lengths.items():
                vector = getattr(layer, name)
                setattr(to, name, None if vector is None else self._floats(name, vector, (length,)))
        self._layers = packed
        self._model = _Model(
            *(getattr(shape, name) or 0 for name in _SIZES),
            cos.shape[0],
            shape.rms_norm_eps,
            packed,
            cos=self._floats("cos", cos[:, :half], (cos.shape[0], half)),
            sin=self._floats("sin", sin[:, :half], (cos.shape[0], half)),
        )

    def _matrix(self, name: str, matrix: PackedMatrix, size: tuple[int, int]) -> _Matrix:
        if (matrix.rows, matrix.columns) != size:
            raise ValueError(f"{name} should be {size}: got {(matrix.rows, matrix.columns)}")
        self._alive.append(matrix.data)
        return _structure(matrix)

    def _floats(self, name: str, values: Tensor, size: tuple[int, ...]) -> int:
        if values.shape != size:
            raise ValueError(f"{name} should be {size}: got {tuple(values.shape)}")
        self._alive.append(values.detach().to("cpu", torch.float32).contiguous().clone())
        return self._alive[-1].data_ptr()

    def _check_places(self, keys: Tensor, values: Tensor, batch: int, bound: int) -> None:
        """keys, values: (layers, batch, kv_heads, capacity, head_dim) of one dtype."""
        shape, capacity = self.shape, keys.shape[3]
        size = (keys.shape[0], batch, shape.num_kv_heads, capacity, shape.head_dim)
        for name, cache in (("keys", keys), ("values", values)):
            if cache.shape != size or not cache.is_contiguous() or cache.dtype != keys.dtype:
                raise ValueError(f"{name} should be {size} {keys.dtype} contiguous: got {tuple(cache.shape)}")
        if not 0 < bound <= min(capacity, self._model.max_position):
            raise ValueError(f"bound should be in 1..{min(capacity, self._model.max_position)}: got {bound}")

    def _check_fault(self, fault: int, positions: Tensor, bound: int) -> None:
        """What the library returned."""
        if fault == 2:
            raise ValueError(f"positions should be in [0, {bound}): got {positions.tolist()}")
        if fault:
            raise MemoryError(NO_MEMORY)


class NativeDecoder(NativeLayers):
    """A Llama-family decoder (RMSNorm, half-split rotary embedding, grouped-query attention, SwiGLU) on this CPU.

    embedding and lm_head (V, H); the two may be one object. final_norm (H,). cos, sin: as for NativeLayers.
    """

    def __init__(
        self,
        shape: NativeShape,
        embedding: PackedMatrix,
        layers: Sequence[NativeLayer],
        final_norm: Tensor,
        lm_head: PackedMatrix,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        super().__init__(shape, layers, shape.hidden_size, cos, sin)
        vocabulary = (shape.vocab_size, shape.hidden_size)
        self._model.final_norm = self._floats("final_norm", final_norm, vocabulary[1:])
        self._model.embedding = self._matrix("embedding", embedding, vocabulary)
        self._matrix("lm_head", lm_head, vocabulary)
        self._lm_head = PackedLinear(lm_head)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        bound: int,
        num_layers: int | None = None,
        features: tuple[Sequence[int], Tensor] | None = None,
    ) -> Tensor:
        """Final-normed hidden states (B, Q, H) float32, as `LanguageModel.forward` says.

        token_ids, positions: (B, Q) int64. keys, values: (layers, B, kv_heads, capacity, head_dim) float32 or
        bfloat16, contiguous. bound: above every position. features: n layers and a buffer (B, capacity, n * H) float32
        that takes what enters them (num_layers: the result). ValueError for an id or a position out of range.
        """
        shape = self.shape
        batch, queries = token_ids.shape
        capacity = keys.shape[3]
        layers = shape.num_layers if num_layers is None else num_layers
        self._check_places(keys, values, batch, bound)
        if keys.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"keys should be float32 or bfloat16: got {keys.dtype}")
        if not 0 <= layers <= min(shape.num_layers, keys.shape[0]):
            raise ValueError(f"num_layers should be at most {min(shape.num_layers, keys.shape[0])}: got {layers}")
        if token_ids.dtype != torch.int64 or positions.dtype != torch.int64 or positions.shape != token_ids.shape:
            raise ValueError("token_ids and positions should be int64 of one shape (B, Q)")
        token_ids, positions = token_ids.contiguous(), positions.contiguous()
        recorded, n_recorded, buffer = self._recorded(features, batch, capacity)
        hidden = torch.empty(batch, queries, shape.hidden_size)
        fault = self._library.flashspec_forward(
            ctypes.byref(self._model),
            token_ids.data_ptr(),
            positions.data_ptr(),
            batch,
            queries,
            layers,
            keys.data_ptr(),
            values.data_ptr(),
            keys.dtype == torch.bfloat16,
            capacity,
            bound,
            hidden.data_ptr(),
            recorded,
            n_recorded,
            buffer,
            torch.get_num_threads(),
        )
        if fault == 1:
            raise ValueError(f"token_ids should be in [0, {shape.vocab_size}): got {token_ids.tolist()}")
        self._check_fault(fault, positions, bound)
        return hidden

    def _recorded(
        self, features: tuple[Sequence[int], Tensor] | None, batch: int, capacity: int
    ) -> tuple[ctypes.Array[ctypes.c_int64] | None, int, int | None]:
        if features is None:
            return None, 0, None
        layers, buffer = features
        size = (batch, capacity, len(layers) * self.shape.hidden_size)
        if buffer.shape != size or buffer.dtype != torch.float32 or not buffer.is_contiguous():
            raise ValueError(f"features should be {size} float32 contiguous: got {tuple(buffer.shape)} {buffer.dtype}")
        return (ctypes.c_int64 * len(layers))(*layers), len(layers), buffer.data_ptr()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., H) float32 -> (..., V) float32."""
        return self._lm_head(hidden)
