"""What the target makes of a text, computed anew for every batch: storing it would take 5 kB a token and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.drafters.heads import eagle_layers
from flashspec.models.decoder import Decoder
from flashspec.training.layers import decoder_layer, rotary_waves, window_mask


@dataclass(frozen=True, slots=True)
class Reading:
    """The target's hidden states over texts of T tokens, in its own dtype."""

    embedding: Tensor  # (B, T, hidden)
    fused: Tensor  # (B, T, n hidden): the residual stream after each of n feature layers, side by side
    final: Tensor  # (B, T, hidden), after the final norm


def default_feature_layers(num_layers: int) -> list[int]:
    """Low, middle, high, as public EAGLE-3 heads have them, ascending; index i is the residual stream after layer i, -1
    the embedding. Below 7 layers, where those coincide, the highest three that there are, or fewer. The last layer's is
    never among them: a drafter sees it behind the final norm only."""
    entered = eagle_layers(num_layers) if num_layers >= 7 else range(max(num_layers - 3, 0), num_layers)
    return [layer - 1 for layer in entered]


@torch.no_grad()
def hidden_states(model: Decoder, token_ids: Tensor, feature_layers: Sequence[int]) -> Reading:
    """token_ids: (B, T) int64, rows padded behind their end, where the result means nothing."""
    config, weights = model.config, model.weights
    length = token_ids.shape[1]
    waves = rotary_waves(config.inv_freq, config.rotary_scale, torch.arange(length, device=model.device))
    masks = {window: window_mask(length, window, model.device) for window in set(config.windows)}
    embedding = F.embedding(token_ids, weights.embedding)
    hidden, features = embedding, {-1: embedding}
    for index, layer in enumerate(weights.layers):
        hidden = decoder_layer(config, layer, hidden, waves, masks[config.windows[index]])
        if index in feature_layers:
            features[index] = hidden
    final = F.rms_norm(hidden, weights.final_norm.shape, weights.final_norm, config.norm_eps)
    return Reading(embedding, torch.cat([features[index] for index in feature_layers], -1), final)


def feature_scales(reading: Reading, lengths: Tensor) -> list[float]:
    """The median sizes (root mean square) of the n fused features, of the final state and of the embedding, n + 2; the
    mean would be that of a text's first token, which is 40 times the others' in SmolLM2."""
    positions = torch.arange(reading.final.shape[1], device=lengths.device)
    inside = positions < lengths[:, None]  # (B, T): behind its end a text's states may be hundreds of times as large
    states = torch.cat([reading.fused, reading.final, reading.embedding], -1)[inside].float()
    parts = torch.split(states, reading.final.shape[-1], -1)
    return [float(part.pow(2).mean(-1).sqrt().median()) for part in parts]
