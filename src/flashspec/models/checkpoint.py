"""What a checkpoint says: its config as a `DecoderConfig`, its named tensors as a decoder's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.models.decoder import DecoderConfig, DecoderWeights, LayerWeights
from flashspec.models.rotary import SCALINGS, inverse_frequencies, scaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# What transformers assumes where a config.json is silent.
_SILENT = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {"max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
}


class UnsupportedModel(FlashSpecError):
    """A model that the fast decoder would not reproduce."""


class Checkpoint(Protocol):
    """Named tensors under the names that transformers gives them. FlashSpecError where one is missing."""

    def tensor(self, name: str) -> Tensor: ...


class StateDict:
    """The tensors of a loaded transformers model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise FlashSpecError(f"the model has no tensor {name!r}")
        return self._tensors[name]


class SafetensorsFolder:
    """The usual folder: one file, or several files beside an index; mapped, not read."""

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        index = folder / f"{single}.index.json"
        names = set(read_json(index)["weight_map"].values()) if index.exists() else {single}
        for name in sorted(names):
            file = self._open(folder / name)
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            pickled = "; its pickled weights (*.bin) are never loaded" if any(path.parent.glob("*.bin")) else ""
            raise FlashSpecError(f"{path.parent} has no {path.name}{pickled}")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise FlashSpecError(f"{path} is damaged or cut short ({error}): fetch it again") from None

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise FlashSpecError(f"the safetensors in {self._folder} hold no tensor {name!r}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """FlashSpecError where the file is missing, or is not a JSON object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FlashSpecError(f"{path.parent} has no {path.name}: a model folder needs one") from None
    except (OSError, ValueError) as error:
        raise FlashSpecError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise FlashSpecError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def kind_of_head(config: Mapping[str, Any]) -> str | None:
    """Of a drafter's head with this config.json, ours or a public one; None for any other model."""
    ours = config.get("flashspec", {}).get("kind")
    if ours is not None:
        return str(ours)
    if "medusa_num_heads" in config:
        return "medusa"
    named = any("eagle3" in name.lower() for name in config.get("architectures") or [])
    return "eagle3" if named or "draft_vocab_size" in config else None


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """From the contents of a config.json; UnsupportedModel says which field is in the way."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModel(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    config = {**_SILENT[model_type], **raw}
    _refuse(config)
    rope = {"rope_theta": config.get("rope_theta") or 10000.0}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden_size // heads
        inv_freq, rotary_scale = inverse_frequencies(rope, head_dim, config["max_position_embeddings"])
        return DecoderConfig(
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_context=config["max_position_embeddings"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            inv_freq=inv_freq,
            rotary_scale=rotary_scale,
            windows=_windows(config),
            qkv_bias=model_type == "qwen2" or config.get("attention_bias", False),
            output_bias=model_type != "qwen2" and config.get("attention_bias", False),
            qk_norm=model_type == "qwen3",
            tied_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise FlashSpecError(f"the model's config.json has no field {error.args[0]!r}") from None


def _refuse(config: Mapping[str, Any]) -> None:
    """What the decoder has no code for."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling(rope) not in SCALINGS:
        raise UnsupportedModel(f"rope_type is {scaling(rope)!r}, the fast decoder knows {', '.join(SCALINGS)}")
    expected = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "mlp_bias": (config.get("mlp_bias") or False, False),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), 1.0),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for field, (value, supported) in expected.items():
        if value != supported:
            raise UnsupportedModel(f"{field} is {value!r}, the fast decoder needs {supported!r}")


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window. Qwen slides only when asked to, and from a certain layer on."""
    count: int = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    match config["model_type"]:
        case "mistral":
            return (window,) * count
        case "llama":
            return (None,) * count
    if not config.get("use_sliding_window"):
        return (None,) * count
    kinds = config.get("layer_types")
    if kinds is None:
        first: int = config["max_window_layers"]
        return tuple(window if index >= first else None for index in range(count))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Weights:
    """A checkpoint's tensors on one device in one dtype; FlashSpecError where one is missing or of another shape."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype

    def read(self, shape: tuple[int, ...], *names: str) -> Tensor:
        """The named tensors, joined along the rows."""
        tensors = [self._checkpoint.tensor(name).to(self._device, self._dtype) for name in names]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if joined.shape != shape:
            raise FlashSpecError(
                f"{' + '.join(names)} has shape {tuple(joined.shape)}, but the model's config asks for {shape}"
            )
        return joined

    def layer(self, c: DecoderConfig, prefix: str, inputs: int = 1) -> LayerWeights:
        """A decoder layer, what is used together fused. inputs: how many times hidden_size its attention reads."""
        attention, mlp, read = f"{prefix}.self_attn", f"{prefix}.mlp", self.read
        qkv_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv = [f"{attention}.{x}_proj" for x in "qkv"]
        qk_norm = None
        if c.qk_norm:
            q, k = (read((c.head_dim,), f"{attention}.{x}_norm.weight") for x in "qk")
            qk_norm = torch.cat([q.expand(c.num_heads, -1), k.expand(c.num_kv_heads, -1)])
        return LayerWeights(
            attention_norm=read((c.hidden_size,), f"{prefix}.input_layernorm.weight"),
            qkv=read((qkv_rows, inputs * c.hidden_size), *(f"{name}.weight" for name in qkv)),
            qkv_bias=read((qkv_rows,), *(f"{name}.bias" for name in qkv)) if c.qkv_bias else None,
            qk_norm=qk_norm,
            output=read((c.hidden_size, c.num_heads * c.head_dim), f"{attention}.o_proj.weight"),
            output_bias=read((c.hidden_size,), f"{attention}.o_proj.bias") if c.output_bias else None,
            mlp_norm=read((c.hidden_size,), f"{prefix}.post_attention_layernorm.weight"),
            gate_up=read((2 * c.intermediate_size, c.hidden_size), f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            down=read((c.hidden_size, c.intermediate_size), f"{mlp}.down_proj.weight"),
        )


def decoder_weights(
    config: DecoderConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> DecoderWeights:
    """Every tensor of the decoder on one device in one dtype; what is used together is fused."""
    weights = Weights(checkpoint, device, dtype)
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = weights.read(vocabulary, "model.embed_tokens.weight")
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(weights.layer(config, f"model.layers.{index}") for index in range(config.num_layers)),
        final_norm=weights.read((config.hidden_size,), "model.norm.weight"),
        lm_head=embedding if config.tied_embeddings else weights.read(vocabulary, "lm_head.weight"),
    )
