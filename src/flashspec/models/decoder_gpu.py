"""The Llama family's forward for few tokens on a GPU: five or six launches a layer, all of which a CUDA graph may hold.

The grids depend on the cache's capacity, never on lengths, which are read on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels import attention, elementwise, linear, recording
from flashspec.kernels.decoding import MOST_QUERIES, MOST_ROWS_AND_QUERIES, MOST_TOKENS, InBytes, Weight, values_of
from flashspec.kernels.tiling import IN_NO_CACHE, MEASURED, choose
from flashspec.models.base import LEAST_SLOTS, Features, KVCache

if TYPE_CHECKING:
    from flashspec.models.decoder import DecoderConfig, DecoderWeights, LayerWeights

ROUNDED = 32 << 20  # bytes
LATER = (256, 128), (16, 3)  # tokens: a prompt's chunks, and a step of two drafts; those of a group share a thread
Record = Callable[[int, Tensor], None]  # keeps the hidden states that enter a layer


def fits(config: DecoderConfig) -> bool:
    """Heads of 16, 32 ... 256 dimensions, and widths that 16-byte loads divide."""
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    return config.head_dim <= 256 and all(width % 16 == 0 for width in widths)


def read_as(weight: Tensor, rounded: bool) -> Weight:
    """In eight bits where half the bytes save more time than the launch takes that rounds the inputs."""
    return InBytes.of(weight) if rounded and weight.dtype != torch.float32 and weight.nbytes >= ROUNDED else weight


class Product:
    """x (..., in) by a weight (out, in), in a dtype: few tokens at the memory's speed, many by cuBLAS.

    eps: of the norm whose `squares` a call with few tokens may bring, as for `linear.project`. rounded: few tokens take
    the weight in eight bits, half of what there is to read; for drafters, whose text is checked."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None, eps: float = 0.0, rounded: bool = False
    ) -> None:
        self._weight, self._dtype, self._bias, self._eps = weight, dtype, bias, eps
        self.few = read_as(weight, rounded)
        self._tuned = False

    def tune(self) -> None:
        """Measure what has not been measured on this GPU; nothing while a graph is captured."""
        if not self._tuned and not _capturing():
            linear.tune(self.few)
            self._tuned = True

    def __call__(self, x: Tensor, squares: Tensor | None = None) -> Tensor:
        if not 0 < x.numel() <= MOST_TOKENS * x.shape[-1]:
            return F.linear(x, self._weight, self._bias).to(self._dtype)
        self.tune()
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # a view of every row's last token is not
        return linear.project(rows, self.few, self._bias, squares, self._eps, self._dtype).view(*x.shape[:-1], -1)


class FewTokens:
    """`forward` and `logits` of a decoder, as its `LanguageModel` contract has them, but for few tokens. rounded: as a
    product's, for what comes behind attention."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, frequencies: Tensor, rounded: bool = False
    ) -> None:
        self._config, self._weights, self._frequencies = config, weights, frequencies
        self._score = Product(weights.lm_head, torch.float32, eps=config.norm_eps, rounded=rounded)
        self._behind = [
            tuple(read_as(each, rounded) for each in (layer.output, layer.gate_up, layer.down))
            for layer in weights.layers
        ]
        self._tuned = False

    def takes(self, token_ids: Tensor) -> bool:
        return 0 < token_ids.numel() <= MOST_ROWS_AND_QUERIES and token_ids.shape[1] <= MOST_QUERIES

    def tune(self) -> None:
        """As a product does, all of them: the layers' while they run one behind the other."""
        if self._tuned or _capturing():
            return
        self._tuned = True
        c, embedding = self._config, self._weights.embedding
        shape = (len(self._rehearsed()), 1, c.num_kv_heads, LEAST_SLOTS, c.head_dim)
        cache = KVCache(embedding.new_zeros(shape), embedding.new_zeros(shape))
        slots = torch.arange(LEAST_SLOTS, device=embedding.device)[None]
        texts = {tokens: slots[:, -tokens:].clone() for tokens in chain(MEASURED, *LATER)}  # aligned, as in use
        output, gate_up, down = map(values_of, self._behind[0])
        products = [(values_of(self._qkv_weight()), False), (output, False), (gate_up, True), (down, False)]

        def run(sizes: Sequence[int]) -> None:
            for tokens in sizes:
                self._rehearse(texts[tokens], cache)

        try:
            choose(products, partial(run, MEASURED), later=[partial(run, sizes) for sizes in LATER])
            self._score.tune()
        except BaseException:
            self._tuned = False
            raise

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        num_layers: int | None,
        features: Features | None = None,
    ) -> Tensor:
        self.tune()
        layers, positions = self._weights.layers[:num_layers], positions.contiguous()

        wanted, states = () if features is None else features.layers, list[Tensor]()

        def record(layer: int, hidden: Tensor) -> None:
            if layer in wanted:
                states.append(hidden)

        normed = self._run(token_ids.contiguous(), positions, cache, layers, record)
        record(self._config.num_layers, normed)
        if features is not None:
            recording.record(states, positions, features.by_layer)
        return normed.view(*token_ids.shape, -1)

    def _qkv_weight(self) -> Weight:
        return self._weights.layers[0].qkv

    def _rehearse(self, tokens: Tensor, cache: KVCache) -> None:
        """tokens: (1, Q), each its own position."""
        self._run(tokens, tokens, cache, self._rehearsed(), lambda *_: None)

    def _rehearsed(self) -> tuple[LayerWeights, ...]:
        """As many layers as do not stay in L2."""
        layers = self._weights.layers
        first = layers[0]
        n_bytes = first.qkv.nbytes + first.output.nbytes + first.gate_up.nbytes + first.down.nbytes
        return layers[: max(-(-4 * IN_NO_CACHE // n_bytes), 4)]  # of which few are first or last

    def logits(self, hidden: Tensor, squares: Tensor | None = None) -> Tensor:
        """squares: where hidden is not normed, but its product with the norm's weight."""
        return self._score(hidden, squares)

    def _run(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, layers: tuple[LayerWeights, ...], record: Record
    ) -> Tensor:
        run = self._narrow if token_ids.numel() <= MOST_TOKENS else self._wide
        return run(token_ids, positions, cache, layers, record)

    def _narrow(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, layers: tuple[LayerWeights, ...], record: Record
    ) -> Tensor:
        """Every product at the memory's speed, with norm, activation and residual inside it."""
        eps, dtype = self._config.norm_eps, self._weights.embedding.dtype
        n_squares = linear.n_parts(self._behind[0][2], token_ids.numel())  # as later layers have them
        hidden, weighted, squares, waves = self._embed(token_ids, positions, layers[0], n_squares)
        for index, layer in enumerate(layers):
            record(index, hidden)
            qkv = linear.project(weighted, layer.qkv, layer.qkv_bias, squares, eps, dtype)
            mixed = self._attend(index, qkv, waves, positions, cache)
            hidden, weighted, squares = self._add_narrow(index, mixed, hidden, self._norm_after(index, layers))
        return elementwise.normalise(hidden, self._weights.final_norm, eps)

    def _wide(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, layers: tuple[LayerWeights, ...], record: Record
    ) -> Tensor:
        """cuBLAS's products, which are ahead from some 64 tokens on."""
        eps = self._config.norm_eps
        hidden, _, _, waves = self._embed(token_ids, positions, layers[0], 1)
        normed = elementwise.normalise(hidden, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            record(index, hidden)
            mixed = self._attend(index, F.linear(normed, layer.qkv, layer.qkv_bias), waves, positions, cache)
            hidden, normed = self._add_wide(index, mixed, hidden, self._norm_after(index, layers))
        return normed

    def _add_narrow(
        self, index: int, mixed: Tensor, hidden: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rest of a layer after its attention; following: the weight of the norm behind it. As `project_add`."""
        layer, (output, gate_up, down) = self._weights.layers[index], self._behind[index]
        hidden, weighted, squares = linear.project_add(mixed, output, layer.output_bias, hidden, layer.mlp_norm)
        gated = linear.project_gated(weighted, gate_up, squares, self._config.norm_eps)
        return linear.project_add(gated, down, None, hidden, following)

    def _add_wide(self, index: int, mixed: Tensor, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the norm applied: new hidden, normed."""
        eps, layer = self._config.norm_eps, self._weights.layers[index]
        delta = F.linear(mixed, layer.output, layer.output_bias)
        hidden, normed = elementwise.add_norm(hidden, delta, layer.mlp_norm, eps)
        delta = F.linear(elementwise.gate(F.linear(normed, layer.gate_up)), layer.down)
        return elementwise.add_norm(hidden, delta, following, eps)

    def _embed(
        self, token_ids: Tensor, positions: Tensor, first: LayerWeights, n_squares: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, embedding = self._config.rotary_scale, self._weights.embedding
        return elementwise.embed(
            token_ids, positions, embedding, first.attention_norm, self._frequencies, scale, n_squares
        )

    def _attend(self, index: int, qkv: Tensor, waves: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        layer, window = self._weights.layers[index], self._config.windows[index]
        keys, values, eps = cache.keys[index], cache.values[index], self._config.norm_eps
        return attention.attend(qkv, waves, positions, keys, values, layer.qk_norm, eps, window)

    def _norm_after(self, index: int, layers: tuple[LayerWeights, ...]) -> Tensor:
        return layers[index + 1].attention_norm if index + 1 < len(layers) else self._weights.final_norm


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
