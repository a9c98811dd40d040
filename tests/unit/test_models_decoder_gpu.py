"""The GPU's forward for few tokens against the decoder itself, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from small_models import decoder_of

from flashspec.kernels import TRITON_AVAILABLE
from flashspec.models.base import KVCache
from flashspec.models.decoder import Decoder, DecoderConfig

if not TRITON_AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)

from flashspec.models.decoder_gpu import FewTokens, fits

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on a GPU")


def config(**changes: object) -> DecoderConfig:
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_context": 64,
        "norm_eps": 1e-5,
        "inv_freq": tuple(1 / 100 ** (i / 8) for i in range(8)),
        "windows": (None, None),
    }
    return DecoderConfig(**{**shape, **changes})


def decoder(c: DecoderConfig) -> Decoder:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return decoder_of(c, normal)


@CPU_ONLY
@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True, "output_bias": True, "rotary_scale": 1.2}, {"qk_norm": True, "windows": (None, 3)}],
    ids=["plain", "biases", "norms-and-windows"],
)
@pytest.mark.parametrize("queries", [3, 33], ids=["narrow", "wide"])
def test_few_tokens_are_what_the_decoder_says(changes: dict, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(config(**changes))
    few = FewTokens(model.config, model.weights, model._inv_freq)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 40)
    model.forward(ids, torch.arange(40).expand(2, 40), cache, 40)
    ours = KVCache(cache.keys.clone(), cache.values.clone())
    positions = torch.tensor([[4], [6]]) + torch.arange(queries)
    tokens = ids.flip(1)[:, :queries]
    expected = model.forward(tokens, positions, cache, 40)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden = few.forward(tokens, positions, ours, None)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few.logits(hidden), model.logits(expected), rtol=1e-4, atol=1e-4)
    last = few.logits(hidden[:, -1])  # strides over tokens
    torch.testing.assert_close(last, model.logits(expected[:, -1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, cache.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.values, cache.values, rtol=1e-4, atol=1e-5)


@CPU_ONLY
def test_an_early_exit_ends_with_the_final_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(config())
    few = FewTokens(model.config, model.weights, model._inv_freq)
    ids, positions = torch.tensor([[3, 4]]), torch.tensor([[0, 1]])
    expected = model.forward(ids, positions, model.new_cache(1, 8), 8, num_layers=1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    actual = few.forward(ids, positions, model.new_cache(1, 8), 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_which_calls_and_shapes_it_takes() -> None:
    few = FewTokens(config(), decoder(config()).weights, torch.ones(8))
    assert few.takes(torch.zeros(32, 17)) and few.takes(torch.zeros(1, 1))
    assert few.takes(torch.zeros(4, 256)) and not few.takes(torch.zeros(1, 257))
    assert not few.takes(torch.zeros(5, 256)) and not few.takes(torch.zeros(0, 1))
    assert fits(config()) and not fits(config(head_dim=512)) and not fits(config(intermediate_size=50))


def test_a_cpu_keeps_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = decoder(config())
    assert model._few_tokens is None
