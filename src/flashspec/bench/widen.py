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
from flashspec.drafters import Drafter
from flashspec.drafters.eagle import EagleDrafter, EagleHead, Fusion
from flashspec.drafters.heads import load_head
from flashspec.drafters.medusa import Beside, MedusaDrafter, MedusaHeads, product_by
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.shipped import shipped_heads
from flashspec.engine.arms import head_folder
from flashspec.models.base import Vocabulary
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
        return wide, Widening(config, wide, Filler(dtype, device, seed)).weights(weights)


def widened_model(
    source: str, shape: str, device: str, dtype: str, drafters: Sequence[str] = ()
) -> tuple[LoadedModel, dict[str, Drafter]]:
    """The named small model, tokenizer and all, widened to the named shape; its name says so. With it those drafters,
    by their names, that are heads of the small model: folders, or kinds that come with the package for it."""
    place = torch.device(device)
    # On a CPU a float32 model would be packed for the native kernel; bfloat16 weights can be read.
    loaded = load_model(source, device=device, dtype="bfloat16" if place.type == "cpu" else dtype)
    small = loaded.model
    if not isinstance(small, Decoder):
        raise FlashSpecError(f"{loaded.name} does not run on the fast decoder, so it cannot be widened")
    kind = small.dtype if dtype == "auto" else getattr(torch, dtype)
    wanted = find_shape(shape)
    wide = Decoder(*widen(small.config, small.weights, wanted, kind, place))
    shipped = shipped_heads(small)
    folders = {name: head_folder(name) or shipped.get(name) for name in drafters}
    heads = {
        name: widen_head(load_head(folder, small, name), small, wide, wanted)
        for name, folder in folders.items()
        if folder is not None
    }
    return replace(loaded, model=wide, name=label(wanted, wide.config, loaded.name)), heads


@torch.no_grad()
def widen_head(drafter: Drafter, small: Decoder, wide: Decoder, shape: Shape, seed: int = 1) -> Drafter:
    """A head of the small target as one of the wide target, whose states it reads: the same drafts, at the cost of a
    head of the shape's sizes. The draft vocabulary and the number of layers stay."""
    filler, hidden = Filler(wide.dtype, wide.device, seed), small.hidden_size

    def layers(model: Decoder, inputs: int) -> tuple[DecoderConfig, DecoderWeights]:
        config = widened_config(model.config, replace(shape, num_layers=model.num_layers))
        widening = Widening(model.config, config, filler, inputs, (small.vocabulary(), wide.vocabulary()))
        return config, widening.weights(model.weights)

    if isinstance(drafter, MedusaDrafter):
        return MedusaDrafter(_wide_medusa(drafter.heads, small, wide, filler), drafter.name)
    if isinstance(drafter, EagleDrafter) and drafter.head.hidden_size == hidden:
        fusion = _wide_fusion(drafter.head.fusion, wide.hidden_size, filler)
        return EagleDrafter(EagleHead(*layers(drafter.head, 2), fusion), drafter.name)
    model = drafter.model if isinstance(drafter, ModelDrafter) else None
    if isinstance(drafter, ModelDrafter) and isinstance(model, Decoder) and model.hidden_size == hidden:
        return ModelDrafter(Decoder(*layers(model, 1)), drafter.name, drafter.part)
    raise FlashSpecError(
        f"drafter {drafter.name!r} cannot be widened: it is no head of its target's hidden size, {hidden}"
    )


def _wide_fusion(fusion: Fusion, size: int, filler: Filler) -> Fusion:
    norm = _placed(filler.norm(size), fusion.hidden_norm.float() * math.sqrt(len(fusion.fc) / size))
    return replace(fusion, fc=_wide_fc(fusion.fc, len(fusion.layers), size, filler), hidden_norm=norm)


def _wide_fc(fc: Tensor, count: int, size: int, filler: Filler) -> Tensor:
    """Over `count` states side by side: zero where it would carry the small ones out of the first block of what it
    writes to."""
    small, wide = fc.view(len(fc), count, -1), filler.matrix(size, count, size)
    wide[:, :, : small.shape[2]] = 0
    return _placed(wide, small).flatten(1)


def _wide_medusa(heads: MedusaHeads, small: Decoder, wide: Decoder, filler: Filler) -> MedusaHeads:
    """A residual block of zeros adds silu(0) = 0."""
    old, new, count = small.hidden_size, wide.hidden_size, heads.count
    blocks = []
    for weight, bias in heads.blocks:
        matrix = filler.matrix(count, new, new)
        matrix[:, :, :old] = 0
        blocks.append((_placed(matrix, weight), _placed(filler.zeros(count, new), bias)))
    layer = wide.num_layers if heads.layer == small.num_layers else heads.layer
    beside = heads.beside
    if beside is not None:
        fc = _wide_fc(beside.fc, len(beside.layers) + 2, new, filler)
        beside = Beside(beside.layers, fc, wide.vocabulary().embedding)
    changed = replace(heads, blocks=tuple(blocks), layer=layer, beside=beside)
    if heads.lm_heads is not None:
        return replace(changed, lm_heads=_placed(filler.matrix(*heads.lm_heads.shape[:2], new), heads.lm_heads))
    if heads.part is None or heads.score is None:
        return replace(changed, score=wide.logits)
    rows = heads.score(torch.eye(old, dtype=small.dtype, device=small.device)).T  # (V', hidden)
    return replace(changed, score=product_by(_placed(filler.matrix(len(rows), new), rows)))


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


class Widening:
    """h and h' are the hidden sizes. The stream keeps its values in its first h places, so the mean of squares falls by
    h / h': the epsilon falls with it, and norm weights make up for it. inputs: how many streams side by side the
    attention reads. beside: the small and the wide vocabulary of another model, for weights that share the first."""

    def __init__(
        self,
        small: DecoderConfig,
        wide: DecoderConfig,
        filler: Filler,
        inputs: int = 1,
        beside: tuple[Vocabulary, Vocabulary] | None = None,
    ) -> None:
        self.small = small
        self.wide = wide
        self.filler = filler
        self.inputs = inputs
        self.beside = beside
        self.rows = self._head_rows()  # ((H + 2K) d,), where the small model's rows of qkv stand in the wide one
        factors = torch.ones(len(self.rows), 1, 1, device=filler.device)
        factors[: small.num_heads * small.head_dim] = math.sqrt(wide.head_dim / small.head_dim)  # of 1 / sqrt(d)
        self.factors = factors

    def weights(self, small: DecoderWeights) -> DecoderWeights:
        extra, size = self.wide.num_layers - self.small.num_layers, self.wide.hidden_size
        embedding = lm_head = None
        if self.beside is not None:
            known, ready = self.beside
            embedding = ready.embedding if small.embedding is known.embedding else None
            lm_head = ready.lm_head if small.lm_head is known.lm_head else None
        if embedding is None:
            embedding = _placed(self.filler.zeros(len(small.embedding), size), small.embedding)
        if lm_head is None:
            lm_head = _placed(self.filler.matrix(len(small.lm_head), size), small.lm_head)
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(layer) for layer in small.layers) + tuple(self._idle() for _ in range(extra)),
            final_norm=self._norm(small.final_norm),
            lm_head=lm_head,
        )

    def _layer(self, layer: LayerWeights) -> LayerWeights:
        c, wide = self.small, self._idle()
        _placed(wide.attention_norm, self._scaled(layer.attention_norm))
        _placed(wide.mlp_norm, self._scaled(layer.mlp_norm))
        small_qkv, wide_qkv = (qkv.view(len(qkv), self.inputs, -1) for qkv in (layer.qkv, wide.qkv))
        self._place_heads(wide_qkv, small_qkv)
        wide.output[: c.hidden_size, self.rows[: c.num_heads * c.head_dim]] = layer.output.to(wide.output)
        gates = wide.gate_up.view(2, -1, self.wide.hidden_size)
        gates[:, : c.intermediate_size, : c.hidden_size] = layer.gate_up.view(2, -1, c.hidden_size).to(gates)
        _placed(wide.down, layer.down)
        if layer.qkv_bias is not None and wide.qkv_bias is not None:
            self._place_heads(wide.qkv_bias[:, None, None], layer.qkv_bias[:, None, None])
        if layer.output_bias is not None and wide.output_bias is not None:
            _placed(wide.output_bias, layer.output_bias)
        return wide

    def _idle(self) -> LayerWeights:
        """A layer that adds nothing."""
        c, filler = self.wide, self.filler
        query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return LayerWeights(
            attention_norm=filler.norm(c.hidden_size),
            qkv=filler.matrix(query_rows + 2 * kv_rows, self.inputs * c.hidden_size),
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
        """target ((H' + 2K') d', inputs, columns): the small heads; zeros in the places that they leave of a key, so
        that whatever a query holds there scores nothing."""
        c = self.wide
        keys = slice(c.num_heads * c.head_dim, (c.num_heads + self.small.num_kv_heads) * c.head_dim)
        if c.head_dim > self.small.head_dim:
            target[keys] = 0
        target[self.rows, :, : source.shape[2]] = (source.to(self.factors) * self.factors).to(target)

    def _norm(self, weight: Tensor) -> Tensor:
        return _placed(self.filler.norm(self.wide.hidden_size), self._scaled(weight))

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight.float() * math.sqrt(self.small.hidden_size / self.wide.hidden_size)


def _placed(target: Tensor, source: Tensor) -> Tensor:
    """target, with source in its first corner."""
    corner: Sequence[slice] = [slice(size) for size in source.shape]
    target[tuple(corner)] = source.to(target)
    return target
