"""An EAGLE-3 head in one native call against the PyTorch head over the same rounded weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashspec.drafters import eagle_cpu
from flashspec.drafters.eagle import EagleHead, Fusion
from flashspec.kernels import native_build
from flashspec.kernels.native import NativeLayer, PackedMatrix
from flashspec.kernels.native_head import NativeHead
from flashspec.models.base import KVCache
from flashspec.models.decoder import DecoderConfig, DecoderWeights, LayerWeights

pytestmark = pytest.mark.skipif(not native_build.available(), reason=native_build.why_not() or "built")

HIDDEN, INNER, VOCAB, PARTS, SLOTS = 64, 80, 50, 21, 200
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=SLOTS,
    norm_eps=1e-2,  # so that a wrong one shows
    inv_freq=tuple(1 / 100 ** (i / 8) for i in range(8)),
    windows=(None,),
)


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def matrix(rows: int, columns: int) -> Tensor:
    """What q8_0 can hold."""
    return PackedMatrix.quantised(torch.randn(rows, columns) * columns**-0.5).dequantise()


def head_of(lm_head: int = PARTS, **changes: Any) -> EagleHead:
    config = replace(CONFIG, **changes)
    hidden, size, queries = config.hidden_size, config.head_dim, config.num_heads * config.head_dim
    rows = queries + 2 * config.num_kv_heads * size
    layer = LayerWeights(
        attention_norm=1 + 0.3 * torch.randn(hidden),
        qkv=matrix(rows, 2 * hidden),
        output=matrix(hidden, queries),
        mlp_norm=1 + 0.3 * torch.randn(hidden),
        gate_up=matrix(2 * INNER, hidden),
        down=matrix(hidden, INNER),
        qkv_bias=torch.randn(rows) if config.qkv_bias else None,
        output_bias=torch.randn(hidden) if config.output_bias else None,
        qk_norm=torch.rand(config.num_heads + config.num_kv_heads, size) if config.qk_norm else None,
    )
    final_norm, hidden_norm = 1 + 0.3 * torch.randn(2, hidden)
    weights = DecoderWeights(torch.randn(VOCAB, hidden), (layer,), final_norm, matrix(lm_head, hidden))
    return EagleHead(config, weights, Fusion((1, 2), matrix(hidden, 96), hidden_norm))


def twin_of(head: EagleHead) -> EagleHead:
    twin = EagleHead(head.config, head.weights, head.fusion)
    twin._packed = None
    return twin


def draft(head: EagleHead, slots: Tensor) -> tuple[list[Tensor], KVCache]:
    """Logits of a window of text, slots (B, Q), and of two draft tokens after it, in a cache full of other things."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, slots.shape, generator=generator)
    hidden = torch.randn(len(slots), SLOTS, HIDDEN, generator=generator)
    cache = head.new_cache(len(slots), SLOTS)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    tokens[:, 1:] = torch.where(slots[:, 1:] == slots[:, :-1], tokens[:, :-1], tokens[:, 1:])
    tip = head.extend(tokens, hidden.gather(1, slots[..., None].expand(-1, -1, HIDDEN)), slots, cache, SLOTS)
    logits = [head.predict(tip)]
    for offset in (1, 2):
        token_ids = torch.randint(0, VOCAB, (len(slots), 1), generator=generator)
        tip = head.extend(token_ids, tip[0][:, None], slots[:, -1:] + offset, cache, SLOTS)
        logits.append(head.predict(tip))
    return logits, cache


@pytest.mark.parametrize(
    ("rows", "window", "changes"),
    [
        (1, 4, {}),
        (3, 9, {}),
        (3, 4, {"qkv_bias": True, "output_bias": True, "rotary_scale": 1.3, "num_kv_heads": 1}),
        (2, 150, {}),  # more rows than a pass takes
        (70, 1, {}),  # more sequences
        (40, 3, {}),
    ],
)
def test_it_drafts_as_pytorch_does(rows: int, window: int, changes: dict[str, Any]) -> None:
    head = head_of(**changes)
    assert head._packed is not None
    first = torch.arange(rows)[:, None] % 40 * 2 - 2  # the first rows begin at slot 0, several times over
    slots = (first + torch.arange(window)).clamp(min=0)
    (found, ours), (expected, theirs) = draft(head, slots), draft(twin_of(head), slots)
    for ours_now, theirs_now in zip(found, expected, strict=True):
        assert ours_now.shape == (rows, PARTS) and theirs_now.isfinite().all()
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_fusing_and_an_lm_head_of_all_tokens() -> None:
    head = head_of(lm_head=VOCAB)
    twin, x = twin_of(head), torch.randn(5, HIDDEN)
    assert head._packed is not None and head._packed.logits is None
    assert torch.equal(head.predict((x,)), twin.predict((x,)))
    states = torch.randn(2, 3, 96)
    torch.testing.assert_close(head._packed.fuse(states), states @ head.fusion.fc.T, rtol=1e-4, atol=1e-5)


def test_a_fault_stays_in_its_row() -> None:
    head, slots = head_of(), torch.zeros(3, 1).long()
    hidden = torch.randn(3, 1, HIDDEN)
    hidden[1, 0, 5] = torch.nan
    found = head.predict(head.extend(slots, hidden, slots, head.new_cache(3, 4), 4)).isfinite()
    assert found.all(1).tolist() == [True, False, True] and not found[1].any()


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"head_dim": 8, "inv_freq": (1.0,) * 4}, {"qk_norm": True}])
def test_what_the_call_cannot_do_stays_with_pytorch(changes: dict[str, Any]) -> None:
    head = head_of(**changes)
    assert head._packed is None
    assert not eagle_cpu.fits(CONFIG, torch.device("cpu"), torch.bfloat16)
    assert eagle_cpu.fits(CONFIG, torch.device("cpu"), torch.float32)


def test_wrong_arguments_are_named() -> None:
    head = head_of()
    assert head._packed is not None
    layer, cache, x = head._packed._layer, head.new_cache(1, 4), torch.zeros(1, 2, HIDDEN)
    slots, (keys, values) = torch.tensor([[0, 1]]), (cache.keys, cache.values)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        (r"positions should be in \[0, 1\)", (x, x, slots, keys, values, 1)),
        (r"positions should be in \[0, 4\)", (x, x, slots - 1, keys, values, 4)),
        ("bound should be in 1..4", (x, x, slots, keys, values, 5)),
        ("hidden should be .1, 2, 64. float32", (x, x[:, :1], slots, keys, values, 4)),
        ("embedded should be .1, 2, 64. float32", (x.double(), x, slots, keys, values, 4)),
        ("values should be", (x, x, slots, keys, values[..., :3, :], 4)),
        ("keys should be float32", (x, x, slots, keys.bfloat16(), values.bfloat16(), 4)),
        ("positions int64", (x, x, slots.int(), keys, values, 4)),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            layer.extend(*arguments)
    assert not keys.any() and not values.any()  # nothing was written
    shape = replace(layer.shape, hidden_size=48)
    sizes = ((64, 96), (32, 96), (32, 96), (48, 64), (INNER, 48), (INNER, 48), (48, INNER))
    native = NativeLayer(torch.ones(48), torch.ones(48), *(PackedMatrix.quantised(torch.ones(size)) for size in sizes))
    with pytest.raises(ValueError, match="hidden_size should be a multiple of 32: got 48"):
        NativeHead(shape, native, torch.ones(48), torch.ones(4, 8), torch.ones(4, 8))
