"""GGUF files: their header, their tensors under the names of transformers, their tokenizer."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashspec.core import FlashSpecError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# GGML type number -> name, elements a block, bytes a block; the gguf package knows the others.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix as it is stored. rows: (out, bytes a row) uint8 in blocks of GGML type `kind`; columns: in."""

    kind: str
    rows: Tensor
    columns: int

    def dequantised(self) -> Tensor:
        """(out, in): F32, F16 and BF16 as they are, all else in float32."""
        if self.kind in _PLAIN:
            return self.rows.view(_PLAIN[self.kind])
        import gguf

        values = gguf.quants.dequantize(self.rows.numpy(), gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies in the file; a vector counts as a matrix of one column."""

    kind: str
    shape: tuple[int, ...]  # (out, in) or (out,)
    offset: int
    row_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.shape[0] * self.row_bytes


class GgufFile:
    """A `Checkpoint` mapped into memory. metadata: the header's values, without its arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = np.memmap(path, mode="c")  # copy on write: torch wants memory that it may write to
            self.metadata, self._tensors = _parse_header(self._data)
        except OSError as error:
            raise FlashSpecError(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
            raise FlashSpecError(f"{path} is not a GGUF file, or is damaged ({error}): fetch it again") from None
        end = max((stored.end for stored in self._tensors.values()), default=0)
        if end > self._data.size:
            raise FlashSpecError(f"{path} is cut short ({self._data.size} bytes of {end}): fetch it again")
        self.config = _config(self.metadata, self._tensors)

    @property
    def rotary_factors(self) -> list[float] | None:
        """What each rotary frequency is divided by: how a GGUF file says Llama 3.1's scaling."""
        if "rope_freqs.weight" not in self._tensors:
            return None
        factors: list[float] = self._blocks("rope_freqs.weight").dequantised().flatten().tolist()
        return factors

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self.metadata

    @cached_property
    def identity(self) -> str:
        """A name for the contents: hash of the size and the first 16 MiB, where header and vocabulary are."""
        digest = hashlib.sha256(str(self._data.size).encode())
        digest.update(self._data[: 16 << 20].data)
        return digest.hexdigest()[:24]

    def tensor(self, name: str) -> Tensor:
        values = self.blocks(name).dequantised()
        return values.flatten() if len(self._tensors[_stored_name(name)].shape) == 1 else values

    def blocks(self, name: str) -> Blocks:
        """By the name transformers gives it, with the rows in transformers' order."""
        blocks = self._blocks(_stored_name(name))
        if self.metadata["general.architecture"] == "llama" and ("q_proj." in name or "k_proj." in name):
            heads = self.config["num_attention_heads" if "q_proj." in name else "num_key_value_heads"]
            return replace(blocks, rows=_halves_apart(blocks.rows, heads))
        return blocks

    def _blocks(self, stored_name: str) -> Blocks:
        stored = self._tensors.get(stored_name)
        if stored is None:
            raise FlashSpecError(f"{self.path} holds no tensor {stored_name!r}")
        rows = torch.from_numpy(self._data[stored.offset : stored.end]).view(-1, stored.row_bytes)
        return Blocks(stored.kind, rows, stored.shape[1] if len(stored.shape) > 1 else 1)


def _stored_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.{kind}" if layer.isdigit() else f"{_NAMES[module]}.{kind}"


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """llama files keep the two halves of a rotary pair side by side; transformers keeps half a head apart."""
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.data):
            raise ValueError("a text runs over the end")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", "replace")

    def value(self, code: int) -> Any:
        """Scalars and texts; arrays are passed over, as what they hold is read by transformers."""
        if code == _STRING:
            return self.text()
        if code != _ARRAY:
            return self.take(_SCALARS[code])
        code, count = self.take("I"), self.take("Q")
        if code == _STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            self.at += count * struct.calcsize(_SCALARS[code])
        return None


def _parse_header(data: np.memmap[Any, Any]) -> tuple[dict[str, Any], dict[str, _Stored]]:
    cursor = _Cursor(data.data)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor.at = 4
    version = cursor.take("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} should be 2 or 3")
    tensor_count, value_count = cursor.take("Q"), cursor.take("Q")
    metadata = {cursor.text(): cursor.value(cursor.take("I")) for _ in range(value_count)}
    tensors = {}
    for _ in range(tensor_count):
        name = cursor.text()
        sizes = [cursor.take("Q") for _ in range(cursor.take("I"))]  # innermost first
        tensors[name] = (sizes[::-1], *_type(cursor.take("I")), cursor.take("Q"))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return metadata, {name: _stored(start, *described) for name, described in tensors.items()}


def _stored(start: int, sizes: list[int], kind: str, per_block: int, block_bytes: int, offset: int) -> _Stored:
    columns = math.prod(sizes[1:])  # 1 for a vector
    if columns % per_block:
        raise ValueError(f"rows of {columns} do not divide into {kind} blocks of {per_block}")
    return _Stored(kind, tuple(sizes), start + offset, columns // per_block * block_bytes)


def _type(number: int) -> tuple[str, int, int]:
    if number in _TYPES:
        return _TYPES[number]
    import gguf

    kind = gguf.GGMLQuantizationType(number)
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> dict[str, Any]:
    """What a config.json of this model would say; of other architectures only their name."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or metadata.get(f"{architecture}.expert_count"):
        return {"model_type": f"gguf {architecture}"}

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{name}", default)

    heads = get("attention.head_count")
    config = {
        "model_type": architecture,
        "num_hidden_layers": get("block_count"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    if (scaling := get("rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
    return {field: value for field, value in config.items() if value is not None}
