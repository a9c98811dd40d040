"""Rotary frequencies and their scalings, as published checkpoints name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def scaling(rope: Mapping[str, Any]) -> str:
    """Its name; `type` is what older configs call it."""
    name: str = rope.get("rope_type") or rope.get("type") or "default"
    return name


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int, max_context: int) -> tuple[tuple[float, ...], float]:
    """Frequencies (head_dim / 2 of them) and the factor on cos and sin, from a config's rope parameters.

    The scaling is one of SCALINGS; `dynamic` changes nothing within max_context, which is all the decoder serves."""
    rope_type = scaling(rope)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents  # (head_dim / 2,)
    scale = 1.0
    if rope_type == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope_type == "llama3":
        frequencies = _llama3(frequencies, rope, max_context)
    elif rope_type == "yarn":
        frequencies, scale = _yarn(frequencies, rope, max_context)
    return tuple(frequencies.tolist()), scale


def _llama3(frequencies: Tensor, rope: Mapping[str, Any], max_context: int) -> Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between interpolated."""
    trained = rope.get("original_max_position_embeddings") or max_context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = trained * frequencies / (2 * math.pi)  # full turns within the context that was trained
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    scaled: Tensor = (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    return scaled


def _yarn(frequencies: Tensor, rope: Mapping[str, Any], max_context: int) -> tuple[Tensor, float]:
    """Like llama3, but interpolated over the index of the frequency, and attention made sharper."""
    trained = rope.get("original_max_position_embeddings") or max_context
    factor = rope.get("factor") or max_context / trained
    count = len(frequencies)

    def index_of(turns: float) -> float:
        return count * math.log(trained / (turns * 2 * math.pi)) / math.log(rope["rope_theta"])

    first, last = index_of(rope.get("beta_fast") or 32.0), index_of(rope.get("beta_slow") or 1.0)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    stretched = ((torch.arange(count) - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    scale = rope.get("attention_factor")
    if scale is None:
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        if not numerator or not denominator:
            numerator, denominator = 1.0, 0.0
        scale = _sharpness(factor, numerator) / _sharpness(factor, denominator)
    return stretched * frequencies / factor + (1 - stretched) * frequencies, scale


def _sharpness(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
