"""The native CPU kernel behind the model protocol: float32 arithmetic on weights that stay as they are stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashspec.kernels.native import (
    BLOCK,
    GGUF_BLOCK_BYTES,
    GROUP,
    PANEL,
    NativeDecoder,
    NativeLayer,
    NativeShape,
    PackedMatrix,
)
from flashspec.models.base import CORNER, FIRST_ROWS, Features, KVCache, Sample, Vocabulary
from flashspec.models.checkpoint import Checkpoint
from flashspec.models.decoder import DecoderConfig, empty_cache
from flashspec.models.gguf import GgufFile

Matrices = Mapping[str, PackedMatrix]  # by the names that transformers gives them

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class NativeModel:
    """A `LanguageModel` on the CPU. Its token ids and positions must be in range: ValueError otherwise."""

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, matrices: Matrices) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.max_context = config.max_context
        self.num_layers = config.num_layers
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        angles = torch.arange(config.max_context)[:, None] * torch.tensor(config.inv_freq)  # (max_context, D / 2)
        self._matrices = matrices
        self._lm_head = _EMBEDDING if config.tied_embeddings else _LM_HEAD
        self._final_norm = checkpoint.tensor("model.norm.weight").float()
        self._decoder = NativeDecoder(
            _shape(config),
            matrices[_EMBEDDING],
            [_layer(config, checkpoint, matrices, index) for index in range(config.num_layers)],
            self._final_norm,
            matrices[self._lm_head],
            angles.cos() * config.rotary_scale,
            angles.sin() * config.rotary_scale,
        )

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        return empty_cache(self.config, batch_size, capacity, self.dtype, self.device)

    def vocabulary(self) -> Vocabulary:
        unpacked = {name: self._matrices[name].dequantise() for name in {_EMBEDDING, self._lm_head}}
        return Vocabulary(unpacked[_EMBEDDING], unpacked[self._lm_head])

    def sample(self) -> Sample:
        names = [_name(index, matrix) for index in range(self.num_layers) for matrix in _LAYER]
        corners = _corners([self._matrices[name] for name in names])
        return Sample.of(self._final_norm, _first_rows(self._matrices[_EMBEDDING], FIRST_ROWS), corners)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        recorded = None if features is None else (features.layers, features.buffer)
        return self._decoder.forward(token_ids, positions, cache.keys, cache.values, bound, num_layers, recorded)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)


def fits(config: DecoderConfig) -> bool:
    """Whether the kernel can run this decoder: it knows one window for all layers, and heads of 16 n."""
    return config.head_dim % 16 == 0 and len(set(config.windows)) == 1


def pack(config: DecoderConfig, checkpoint: Checkpoint) -> dict[str, PackedMatrix]:
    """Every matrix of a decoder in the kernel's layout: GGUF blocks as they are, bfloat16 too, the rest in float32."""
    names = [_EMBEDDING] if config.tied_embeddings else [_EMBEDDING, _LM_HEAD]
    names += [_name(index, matrix) for index in range(config.num_layers) for matrix in _LAYER]
    return {name: _packed(checkpoint, name) for name in names}


def write_packed(folder: Path, matrices: Matrices) -> None:
    with (folder / "matrices.bin").open("wb") as file:
        for matrix in matrices.values():
            file.write(matrix.data.numpy().data)
    index = {name: [list(m.data.shape), m.rows, m.columns, m.format] for name, m in matrices.items()}
    (folder / "matrices.json").write_text(json.dumps(index))


def read_packed(folder: Path) -> dict[str, PackedMatrix]:
    """In memory of our own: mapped pages are small, and a file's contents are not aligned to cache lines."""
    index = json.loads((folder / "matrices.json").read_text())
    path = folder / "matrices.bin"
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.readinto(data.numpy().data)
    matrices, start = {}, 0
    for name, (shape, *described) in index.items():
        end = start + math.prod(shape)
        matrices[name] = PackedMatrix(data[start:end].view(shape), *described)
        start = end
    return matrices


def layout() -> str:
    """Changes when the kernel's layout does: a hash of a few matrices as it packs them."""
    digest = hashlib.sha256()
    sample = torch.arange(4096) % 251
    for kind, size in GGUF_BLOCK_BYTES.items():
        digest.update(PackedMatrix.from_gguf(sample[: 60 * size].byte().view(30, -1), kind).data.numpy().data)
    for dtype in (torch.float32, torch.bfloat16):
        digest.update(PackedMatrix.from_tensor(sample.view(32, -1).to(dtype)).data.numpy().data)
    return digest.hexdigest()[:8]


def _shape(config: DecoderConfig) -> NativeShape:
    return NativeShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        sliding_window=config.windows[0],
    )


def _layer(config: DecoderConfig, checkpoint: Checkpoint, matrices: Matrices, index: int) -> NativeLayer:
    vectors = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    if config.qk_norm:
        vectors |= {f"{x}_norm": f"self_attn.{x}_norm.weight" for x in "qk"}
    biased = "qkv" * config.qkv_bias + "o" * config.output_bias
    vectors |= {f"{x}_bias": f"self_attn.{x}_proj.bias" for x in biased}
    parts: dict[str, Any] = {
        field: checkpoint.tensor(f"model.layers.{index}.{name}") for field, name in vectors.items()
    }
    parts |= {field: matrices[_name(index, field)] for field in _LAYER}
    return NativeLayer(**parts)


def _first_rows(matrix: PackedMatrix, count: int) -> Tensor:
    return replace(matrix, data=matrix.data[: -(-count // PANEL)], rows=min(count, matrix.rows)).dequantise()


def _corners(matrices: Sequence[PackedMatrix]) -> list[Tensor]:
    """The corners of many: those of one kind at once, as each takes a dozen small operations."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        alike[matrix.format, min(matrix.columns, CORNER[1])].append(place)
    found: dict[int, Tensor] = {}
    for (kind, columns), places in alike.items():
        data = torch.cat([matrices[place].data[:1, : -(-columns // BLOCK), :1] for place in places])
        rows = PackedMatrix(data, GROUP * len(places), columns, kind).dequantise().view(-1, GROUP, columns)
        found |= {place: part[: matrices[place].rows] for place, part in zip(places, rows, strict=True)}
    return [found[place] for place in range(len(matrices))]


def _name(index: int, matrix: str) -> str:
    return f"model.layers.{index}.{_LAYER[matrix]}.weight"


def _packed(checkpoint: Checkpoint, name: str) -> PackedMatrix:
    if isinstance(checkpoint, GgufFile):
        blocks = checkpoint.blocks(name)
        if blocks.kind.lower() in GGUF_BLOCK_BYTES:
            return PackedMatrix.from_gguf(blocks.rows, blocks.kind.lower())
    return PackedMatrix.from_tensor(checkpoint.tensor(name))
