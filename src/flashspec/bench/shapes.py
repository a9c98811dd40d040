"""The shapes that are measured, what a step of them reads, and models of them with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights

FILLER_STD = 0.02  # as checkpoints are initialised: activations stay finite through 80 layers


@dataclass(frozen=True, slots=True)
class Shape:
    """A published decoder's sizes."""

    title: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices as they are fused, and of the LM head."""
        heads, hidden, inner = self.num_heads * self.head_dim, self.hidden_size, self.intermediate_size
        return {
            "qkv": (heads + 2 * self.num_kv_heads * self.head_dim, hidden),
            "output": (hidden, heads),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
            "lm_head": (self.vocab_size, hidden),
        }

    @property
    def attention_size(self) -> int:
        """Weights of a layer's qkv and output projections."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def step_size(self) -> int:
        """Weights that a step reads: every layer's matrices and the LM head."""
        layer = self.attention_size + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size


SHAPES = {
    "135m": Shape("135M", 576, 1536, 9, 3, 64, 30, 49_152),
    "1b": Shape("1B", 2048, 8192, 32, 8, 64, 16, 128_256),
    "8b": Shape("8B", 4096, 14_336, 32, 8, 128, 32, 128_256),
    "70b": Shape("70B", 8192, 28_672, 64, 8, 128, 80, 128_256),
}
# Drafters of growing size; their vocabulary is the target's.
DRAFTER_SHAPES = {
    "30m": Shape("30M", 384, 1024, 6, 2, 64, 16, 0),
    "135m": SHAPES["135m"],
    "360m": Shape("360M", 960, 2560, 15, 5, 64, 32, 0),
    "1b": SHAPES["1b"],
}


def find_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise FlashSpecError(f"shape {name!r} is unknown; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_config(shape: Shape, vocab_size: int | None = None, max_context: int = 8192) -> DecoderConfig:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    return DecoderConfig(
        vocab_size=vocab_size or shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_context=max_context,
        norm_eps=1e-5,
        inv_freq=tuple((500_000.0**-exponents).tolist()),
        windows=(None,) * shape.num_layers,
    )


def step_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one step at batch 1 reads of the weights: all matrices, the LM head and one row of the embedding; not the
    rest of the embedding table, and not the KV cache."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return (c.num_layers * layer + (c.vocab_size + 2) * c.hidden_size) * dtype.itemsize


class Filler:
    """Random tensors made where they are used: 15 GB take a fraction of a second on a GPU, and no copy on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(0.0, FILLER_STD, generator=self.generator)

    def norm(self, size: int) -> Tensor:
        return 1 + self.matrix(size)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@torch.no_grad()
def random_decoder(config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """A model whose text means nothing and whose steps cost what they should; without biases or q and k norms."""
    c, filler = config, Filler(dtype, device, seed)
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            attention_norm=filler.norm(c.hidden_size),
            qkv=filler.matrix(query_rows + 2 * kv_rows, c.hidden_size),
            output=filler.matrix(c.hidden_size, query_rows),
            mlp_norm=filler.norm(c.hidden_size),
            gate_up=filler.matrix(2 * c.intermediate_size, c.hidden_size),
            down=filler.matrix(c.hidden_size, c.intermediate_size),
        )

    weights = DecoderWeights(
        embedding=filler.matrix(c.vocab_size, c.hidden_size),
        layers=tuple(layer() for _ in range(c.num_layers)),
        final_norm=filler.norm(c.hidden_size),
        lm_head=filler.matrix(c.vocab_size, c.hidden_size),
    )
    return Decoder(config, weights)
