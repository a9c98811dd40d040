"""A small real model inside a large shape: it writes the small model's text at the large model's cost.

Only `output` and `down` write to the residual stream: outside the small model's block they are zero, and so is the
embedding. What reads the stream (qkv, gate_up, LM head) is random wherever the small model is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flashspec.bench.shapes import Filler, Shape, find_shape
from flashspec.core import FlashSpecError
from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights
from flashspec.models.loading import LoadedModel, load_model


def widen(
    config: DecoderConfig,
    weights: DecoderWeights,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> tuple[DecoderConfig, DecoderWeights]:
    """The same function as (config, weights) with the sizes of `shape`, made on `device`; the vocabulary stays.

    A shape with fewer layers than the small model keeps the small one's layers, and its MLP is narrowed so that a step
    reads as many bytes as one of the shape. FlashSpecError where the small model does not fit into it."""
    wide = widened_config(config, shape)
    with torch.no_grad():
        return wide, _Widening(config, wide, Filler(dtype, device, seed)).weights(weights)


def widened_model(source: str, shape: str, device: str, dtype: str) -> LoadedModel:
    """The named small model, tokenizer and all, widened to the named shape; its name says so."""
    place = torch.device(device)
    # On a CPU a float32 model would be packed for the native kernel; bfloat16 weights can be read.
    small = load_model(source, device=device, dtype="bfloat16" if place.type == "cpu" else dtype)
    if not isinstance(small.model, Decoder):
        raise FlashSpecError(f"{small.name} does not run on the fast decoder, so it cannot be widened")
    kind = small.model.dtype if dtype == "auto" else getattr(torch, dtype)
    wanted = find_shape(shape)
    config, weights = widen(small.model.config, small.model.weights, wanted, kind, place)
    return replace(small, model=Decoder(config, weights), name=label(wanted, config, small.name))


def label(shape: Shape, config: DecoderConfig, small: str) -> str:
    """What a result made this way is called."""
    changed = f" with {config.num_layers} layers" if config.num_layers != shape.num_layers else ""
    plain = re.sub(r"(-Instruct)?(\.B?[FQ]\d\w*)?$", "", Path(small).name)  # SmolLM2-135M-Instruct.Q4_1 -> SmolLM2-135M
    return f"{shape.title}-shaped{changed} (widened {plain})"


def widened_config(config: DecoderConfig, shape: Shape) -> DecoderConfig:
    if config.qk_norm:
        raise FlashSpecError(
            "a model with q and k norms cannot be widened: they share their epsilon with the wider norms"
        )
    shape = _with_layers(shape, config)
    sizes = {
        "hidden_size": (config.hidden_size, shape.hidden_size),
        "intermediate_size": (config.intermediate_size, shape.intermediate_size),
        "num_kv_heads": (config.num_kv_heads, shape.num_kv_heads),
        "query heads a kv head": (config.group_size, shape.num_heads // shape.num_kv_heads),
        "head_dim": (config.head_dim, shape.head_dim),
    }
    for name, (small, large) in sizes.items():
        if small > large:
            raise FlashSpecError(
                f"{name} is {small} in the small model and {large} in the {shape.title} shape: too small"
            )
    unused = (shape.head_dim - config.head_dim) // 2
    return replace(
        config,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        norm_eps=config.norm_eps * config.hidden_size / shape.hidden_size,
        inv_freq=config.inv_freq + config.inv_freq[-1:] * unused,
        windows=config.windows + (None,) * (shape.num_layers - config.num_layers),
        tied_embeddings=False,
    )


def _with_layers(shape: Shape, config: DecoderConfig) -> Shape:
    """At least the small model's layers, at the shape's bytes a step."""
    if shape.num_layers >= config.num_layers:
        return shape
    layers, head = config.num_layers, config.vocab_size * shape.hidden_size
    mlp = (shape.step_size - head) / layers - shape.attention_size
    return replace(shape, num_layers=layers, intermediate_size=64 * round(mlp / (3 * shape.hidden_size) / 64))


class _Widening:
    """h and h' are the hidden sizes. The stream keeps its values in its first h places, so the mean of squares falls by
    h / h': the epsilon falls with it, and norm weights make up for it."""

    def __init__(self, small: DecoderConfig, wide: DecoderConfig, filler: Filler) -> None:
        self.small = small
        self.wide = wide
        self.filler = filler
        self.rows = self._head_rows()  # ((H + 2K) d,), where the small model's rows of qkv stand in the wide one
        factors = torch.ones(len(self.rows), 1, device=filler.device)
        factors[: small.num_heads * small.head_dim] = math.sqrt(wide.head_dim / small.head_dim)  # of 1 / sqrt(d)
        self.factors = factors

    def weights(self, small: DecoderWeights) -> DecoderWeights:
        vocab_size, hidden = self.wide.vocab_size, self.wide.hidden_size
        extra = self.wide.num_layers - self.small.num_layers
        return DecoderWeights(
            embedding=_placed(self.filler.zeros(vocab_size, hidden), small.embedding),
            layers=tuple(self._layer(layer) for layer in small.layers) + tuple(self._idle() for _ in range(extra)),
            final_norm=self._norm(small.final_norm),
            lm_head=_placed(self.filler.matrix(vocab_size, hidden), small.lm_head),
        )

    def _layer(self, layer: LayerWeights) -> LayerWeights:
        c, wide = self.small, self._idle()
        _placed(wide.attention_norm, self._scaled(layer.attention_norm))
        _placed(wide.mlp_norm, self._scaled(layer.mlp_norm))
        self._place_heads(wide.qkv, layer.qkv)
        wide.output[: c.hidden_size, self.rows[: c.num_heads * c.head_dim]] = layer.output.to(wide.output)
        gates = wide.gate_up.view(2, -1, self.wide.hidden_size)
        gates[:, : c.intermediate_size, : c.hidden_size] = layer.gate_up.view(2, -1, c.hidden_size).to(gates)
        _placed(wide.down, layer.down)
        if layer.qkv_bias is not None and wide.qkv_bias is not None:
            self._place_heads(wide.qkv_bias[:, None], layer.qkv_bias[:, None])
        if layer.output_bias is not None and wide.output_bias is not None:
            _placed(wide.output_bias, layer.output_bias)
        return wide

    def _idle(self) -> LayerWeights:
        """A layer that adds nothing."""
        c, filler = self.wide, self.filler
        query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return LayerWeights(
            attention_norm=filler.norm(c.hidden_size),
            qkv=filler.matrix(query_rows + 2 * kv_rows, c.hidden_size),
            qkv_bias=filler.matrix(query_rows + 2 * kv_rows) if c.qkv_bias else None,
            output=filler.zeros(c.hidden_size, query_rows),
            output_bias=filler.zeros(c.hidden_size) if c.output_bias else None,
            mlp_norm=filler.norm(c.hidden_size),
            gate_up=filler.matrix(2 * c.intermediate_size, c.hidden_size),
            down=filler.zeros(c.hidden_size, c.intermediate_size),
        )

    def _head_rows(self) -> Tensor:
        """Heads keep their kv head; rotary pairs (i, i + d / 2) become (i, i + d' / 2)."""
        small, wide = self.small, self.wide
        groups = torch.arange(small.num_heads) // small.group_size
        queries = groups * wide.group_size + torch.arange(small.num_heads) % small.group_size
        keys = wide.num_heads + torch.arange(small.num_kv_heads)
        heads = torch.cat([queries, keys, keys + wide.num_kv_heads])
        half = torch.arange(small.head_dim // 2)
        places = torch.cat([half, wide.head_dim // 2 + half])
        return (heads[:, None] * wide.head_dim + places).flatten().to(self.filler.device)

    def _place_heads(self, target: Tensor, source: Tensor) -> None:
        """target ((H' + 2K') d', columns): the small heads; zeros in the places that they leave of a key, so that
        whatever a query holds there scores nothing."""
        c = self.wide
        keys = slice(c.num_heads * c.head_dim, (c.num_heads + self.small.num_kv_heads) * c.head_dim)
        if c.head_dim > self.small.head_dim:
            target[keys] = 0
        target[self.rows, : source.shape[1]] = (source.to(self.factors) * self.factors).to(target)

    def _norm(self, weight: Tensor) -> Tensor:
        return _placed(self.filler.norm(self.wide.hidden_size), self._scaled(weight))

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight.float() * math.sqrt(self.small.hidden_size / self.wide.hidden_size)


def _placed(target: Tensor, source: Tensor) -> Tensor:
    """target, with source in its first corner."""
    corner: Sequence[slice] = [slice(size) for size in source.shape]
    target[tuple(corner)] = source.to(target)
    return target
