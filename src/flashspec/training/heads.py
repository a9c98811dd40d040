"""Drafter heads as they are trained: over whole sequences, under the parameter names of public checkpoints.

An *anchor* a is the last position whose hidden states the target has given; the token at a + 1 is known. Draft step k
(from 0) proposes the token at a + 2 + k.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashspec.models.decoder import DecoderConfig, LayerWeights
from flashspec.training.features import Reading
from flashspec.training.layers import Waves, attend, decoder_layer, rotary_waves, rotated

_Entries = tuple[Tensor, Tensor]  # keys and values of every draft step so far, each (B, steps * T, K, D)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """decoder: the sizes of the drafter's own layers. draft_vocab_size: V'. num_heads: of a Medusa set."""

    decoder: DecoderConfig
    draft_vocab_size: int
    num_features: int = 3
    num_heads: int = 4

    @property
    def hidden_size(self) -> int:
        return self.decoder.hidden_size


class DraftHead(nn.Module):
    """A drafter in training. target_rows: (V', hidden), the target's LM head for the draft vocabulary, where it is
    shared; else None."""

    target_rows: Tensor | None

    @abstractmethod
    def unroll(self, reading: Reading, steps: int) -> list[Tensor]:
        """For each draft step the hidden states (B, T, hidden) by anchor, float32. What a step reads is the text's own
        token, in place of what the step before would have said. Behind a row's end they mean nothing."""

    @abstractmethod
    def lm_rows(self, step: int) -> Tensor:
        """(V', hidden), the LM head of a step."""

    def score(self, step: int, hidden: Tensor) -> Tensor:
        """(n, hidden) of a step -> (n, V')."""
        return F.linear(hidden, self.lm_rows(step).to(hidden.dtype))

    def public_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by their public names."""
        state = self.state_dict()
        scales = state.pop("scales", None)
        return state if scales is None else {**state, "fc.weight": state["fc.weight"] / scales}

    def compile_parts(self) -> None:
        """Make what takes most of the time faster, where it runs on a GPU."""

    def _rows(self, own: nn.Linear | None) -> Tensor:
        rows = own.weight if own is not None else self.target_rows
        assert rows is not None
        return rows


def following(by_position: Tensor, offset: int) -> Tensor:
    """(B, T, ...) -> the entry `offset` positions later, zeros behind the end."""
    rest = by_position[:, offset:]
    padding = by_position.new_zeros(by_position.shape[0], by_position.shape[1] - rest.shape[1], *rest.shape[2:])
    return torch.cat([rest, padding], 1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig, inputs: int) -> None:
        super().__init__()
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj, self.o_proj = _linear(inputs, queries), _linear(queries, config.hidden_size)
        self.k_proj, self.v_proj = _linear(inputs, keys), _linear(inputs, keys)


class _Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            _linear(hidden, inner),
            _linear(hidden, inner),
            _linear(inner, hidden),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class _Midlayer(nn.Module):
    """The one layer of an EAGLE-3 head; its residual stream is the fused feature."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.norm_eps
        self.hidden_norm, self.input_layernorm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.self_attn, self.mlp = _Attention(config, 2 * size), _Mlp(config)
        self._before, self._after = self._queries_keys_values, self._rest

    def forward(
        self, embedded: Tensor, feature: Tensor, waves: Waves, earlier: _Entries | None, mask: Tensor
    ) -> tuple[Tensor, _Entries]:
        """embedded, feature: (B, T, hidden). mask: (T, S), over the entries of earlier steps and of this one. Returns
        the hidden states (B, T, hidden), and the entries with this step's."""
        queries, keys, values = self._before(embedded, feature, waves)
        if earlier is not None:
            keys, values = torch.cat([earlier[0], keys], 1), torch.cat([earlier[1], values], 1)
        return self._after(feature, attend(queries, keys, values, mask)), (keys, values)

    def compile_parts(self) -> None:
        """All but attention, whose shapes are too many to compile for."""
        self._before, self._after = torch.compile(self._before), torch.compile(self._after)

    def _queries_keys_values(self, embedded: Tensor, feature: Tensor, waves: Waves) -> tuple[Tensor, Tensor, Tensor]:
        c, attention = self.config, self.self_attn
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)  # (B, T, 2 hidden)
        queries, keys, values = (
            project(both).view(*feature.shape[:2], -1, c.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return rotated(queries, waves), rotated(keys, waves), values

    def _rest(self, feature: Tensor, mixed: Tensor) -> Tensor:
        hidden: Tensor = feature + self.self_attn.o_proj(mixed)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Eagle3Head(DraftHead):
    """Trained on its own rollouts: from the second draft step on a step reads what the one before made of the text,
    and attends, as drafting does, to true entries up to the anchor and to its own drafts behind it.

    scales: the sizes of the features. The optimiser moves every weight by about as much, which for those of a feature
    of size 24 was far too much; it trains weights of features of size 1, and a checkpoint has the quotients."""

    scales: Tensor

    def __init__(self, shape: HeadShape, target_rows: Tensor | None, scales: Sequence[float]) -> None:
        super().__init__()
        size = shape.hidden_size
        self.register_buffer("scales", torch.tensor(scales).repeat_interleave(size))  # (n hidden,)
        self.fc = _linear(shape.num_features * size, size)
        self.midlayer = _Midlayer(shape.decoder)
        self.norm = nn.RMSNorm(size, shape.decoder.norm_eps)
        self.lm_head = None if target_rows is not None else _linear(size, shape.draft_vocab_size)
        self.register_buffer("target_rows", target_rows, persistent=False)

    def unroll(self, reading: Reading, steps: int) -> list[Tensor]:
        embedding, feature = reading.embedding.float(), self.fc(reading.fused.float() / self.scales).float()
        length = feature.shape[1]
        true = torch.ones(length, length, dtype=torch.bool, device=feature.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=feature.device)
        mask, c = torch.cat([true, *[own] * (steps - 1)], 1), self.midlayer.config
        waves = rotary_waves(c.inv_freq, c.rotary_scale, torch.arange(length + steps, device=feature.device))
        entries, outputs = None, []
        for step in range(steps):
            here = waves[0][step : step + length], waves[1][step : step + length]
            visible = mask[:, : (step + 1) * length]
            feature, entries = self.midlayer(following(embedding, 1 + step), feature, here, entries, visible)
            outputs.append(self.norm(feature))
        return outputs

    def compile_parts(self) -> None:
        self.midlayer.compile_parts()

    def lm_rows(self, step: int) -> Tensor:
        return self._rows(self.lm_head)


class _ResBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)  # at first a block changes nothing
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = hidden + F.silu(self.linear(hidden))
        return changed


class MedusaHeads(DraftHead):
    """Head k says the token at a + 2 + k from the target's final hidden state at a: in the public layout from it alone.
    Heads that share the LM head, which that layout does not know, also read the features at a and the token at a + 1.
    They see all of it through one matrix, the final state too: a block can add to it, but take away no more than 0.28.

    scales: the sizes of features, final state and embedding, as in Eagle3Head; None: the public layout."""

    scales: Tensor

    def __init__(self, shape: HeadShape, target_rows: Tensor | None, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        size, blocks = shape.hidden_size, shape.decoder.num_layers
        self.fc: nn.Linear | None = None
        if scales is not None:
            self.register_buffer("scales", torch.tensor(scales).repeat_interleave(size))  # ((n + 2) hidden,)
            self.fc = nn.Linear((shape.num_features + 2) * size, size, bias=False)
            nn.init.zeros_(self.fc.weight)  # at first they read what public heads do
        self.own_lm_heads = target_rows is None
        for head in range(shape.num_heads):
            layers: list[nn.Module] = [_ResBlock(size) for _ in range(blocks)]
            layers += [_linear(size, shape.draft_vocab_size)] if self.own_lm_heads else []
            self.add_module(str(head), nn.ModuleList(layers))
        self.num_heads, self.blocks = shape.num_heads, blocks
        self.register_buffer("target_rows", target_rows, persistent=False)

    def head(self, index: int) -> nn.ModuleList:
        layers = self.get_submodule(str(index))
        assert isinstance(layers, nn.ModuleList)
        return layers

    def unroll(self, reading: Reading, steps: int) -> list[Tensor]:
        read, outputs = self._read(reading), []
        for step in range(min(steps, self.num_heads)):
            hidden = read
            for block in list(self.head(step))[: self.blocks]:
                hidden = block(hidden)
            outputs.append(hidden)
        return outputs

    def _read(self, reading: Reading) -> Tensor:
        """(B, T, hidden) by anchor, what the blocks take."""
        final = reading.final.float()
        if self.fc is None:
            return final
        beside = torch.cat([reading.fused.float(), final, following(reading.embedding.float(), 1)], -1)
        more: Tensor = self.fc(beside / self.scales)
        return final + more

    def lm_rows(self, step: int) -> Tensor:
        own = self.head(step)[-1]
        return self._rows(own if isinstance(own, nn.Linear) else None)


class _Layer(nn.Module):
    """One layer of a Llama model, under its names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn, self.mlp = _Attention(config, config.hidden_size), _Mlp(config)

    def forward(self) -> LayerWeights:
        attention, mlp = self.self_attn, self.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        norms = self.input_layernorm.weight, self.post_attention_layernorm.weight
        return LayerWeights(norms[0], qkv, attention.o_proj.weight, norms[1], gate_up, mlp.down_proj.weight)


class _Body(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        c, positions = self.config, torch.arange(hidden.shape[1], device=hidden.device)
        waves = rotary_waves(c.inv_freq, c.rotary_scale, positions)
        for layer in self.layers:
            hidden = decoder_layer(c, layer(), hidden, waves, None)
        normed: Tensor = self.norm(hidden)
        return normed


class TinyModel(DraftHead):
    """A language model of its own but for the embedding and the LM head, which are the target's."""

    def __init__(self, shape: HeadShape, target_rows: Tensor) -> None:
        super().__init__()
        self.model = _Body(shape.decoder)
        self.register_buffer("target_rows", target_rows, persistent=False)

    def unroll(self, reading: Reading, steps: int) -> list[Tensor]:
        hidden = self.model(reading.embedding.float())
        return [following(hidden, 1 + step) for step in range(steps)]

    def lm_rows(self, step: int) -> Tensor:
        return self._rows(None)
