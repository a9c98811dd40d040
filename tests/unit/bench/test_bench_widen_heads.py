"""A widened head drafts for the widened target what the small head drafts for the small one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import open_run
from small_heads import HIDDEN, LAYERS, PART, VOCAB, write_eagle, write_medusa, write_tiny
from small_models import llama
from torch import Tensor

from flashspec.bench.shapes import SHAPES, Shape
from flashspec.bench.widen import widen, widen_head, widened_model
from flashspec.config import SamplingConfig
from flashspec.core import FlashSpecError
from flashspec.drafters import Drafter
from flashspec.drafters.eagle import EagleDrafter
from flashspec.drafters.heads import load_head
from flashspec.drafters.medusa import MedusaDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.engine.state import DecodeState
from flashspec.kernels import native_build
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.sampling.sampler import make_sampler

WIDE = Shape("wide", 192, 224, 12, 3, 32, LAYERS + 2, 999)
CPU = torch.device("cpu")
PROMPTS = [[3, 7, 1, 7, 20, 9, 4, 4], [5, 12], [31, 2, 2]]
EPS = 0.1  # so that a wrong one shows
HEADS = {
    "eagle": lambda folder: write_eagle(folder, rms_norm_eps=EPS),
    "eagle that knows every token": lambda folder: write_eagle(folder, None, rms_norm_eps=EPS),
    "medusa": lambda folder: write_medusa(folder),
    "medusa by the target's LM head": lambda folder: write_medusa(folder, own=False),
    "medusa by a part of it": lambda folder: write_medusa(folder, own=False, part=PART),
    "beside medusa": lambda folder: write_medusa(folder, own=False, part=PART, beside=True),
    "tiny": lambda folder: write_tiny(folder, rms_norm_eps=EPS),
    "trimmed tiny": lambda folder: write_tiny(folder, PART, rms_norm_eps=EPS),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Heads are not packed into bfloat16."""
    monkeypatch.setattr(native_build, "available", lambda: False)
    with torch.inference_mode():
        yield


def targets(tied: bool) -> tuple[Decoder, Decoder]:
    model = llama(
        VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=96, rms_norm_eps=EPS, tie_word_embeddings=tied
    )
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    small = Decoder(config, decoder_weights(config, state, CPU, torch.float32))
    return small, Decoder(*widen(small.config, small.weights, WIDE, torch.float32, CPU))


def draft_logits(target: Decoder, drafter: Drafter) -> Tensor:
    """(B, 3, V) after a prefill and two steps, so that caches and features of several forwards are read."""
    run = open_run(target, PROMPTS, ["plain", "head:2"], {"head": drafter}, 30, temperature=1.0, seed=2)
    steps = iter(run)
    for _ in range(4):
        next(steps)
    texts = run.state.texts
    sampler = make_sampler(SamplingConfig(temperature=1.0), texts, [], VOCAB, 1, CPU)
    state = DecodeState.create(texts, [60] * len(texts), [], target, sampler)
    proposer = drafter.start(state)
    state.prepare()
    proposer.prepare(state)
    logits = proposer.propose(state, 3).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_widened_heads_logits_are_the_small_ones(tmp_path: Path, kind: str, tied: bool) -> None:
    small, wide = targets(tied)
    head = load_head(HEADS[kind](tmp_path), small, "head")
    expected = draft_logits(small, head)
    assert expected.isfinite().sum() >= 3 * 3 * len(PART)
    torch.testing.assert_close(draft_logits(wide, widen_head(head, small, wide, WIDE)), expected, atol=2e-4, rtol=0)


def tensors_of(drafter: Drafter) -> dict[str, Tensor]:
    if isinstance(drafter, MedusaDrafter):
        weight, bias = drafter.heads.blocks[0]
        own = drafter.heads.lm_heads
        found = {"weight": weight, "bias": bias} | ({} if own is None else {"lm_heads": own})
        return found | ({} if drafter.heads.beside is None else {"fc": drafter.heads.beside.fc})
    assert isinstance(drafter, EagleDrafter | ModelDrafter)
    model = drafter.head if isinstance(drafter, EagleDrafter) else drafter.model
    assert isinstance(model, Decoder)
    layer = model.weights.layers[0]
    names = ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")
    found = {name: getattr(layer, name) for name in names}
    if isinstance(drafter, EagleDrafter):
        found |= {"fc": drafter.head.fusion.fc, "hidden_norm": drafter.head.fusion.hidden_norm}
    return found


@pytest.mark.parametrize("kind", ["eagle", "medusa", "beside medusa", "tiny"])
def test_the_comparison_sees_a_wrong_weight(tmp_path: Path, kind: str) -> None:
    small, wide = targets(tied=True)
    head = load_head(HEADS[kind](tmp_path), small, "head")
    expected = draft_logits(small, head)
    for name in tensors_of(head):
        wrong = widen_head(head, small, wide, WIDE)
        tensor = tensors_of(wrong)[name]
        tensor[(0,) * tensor.dim()] += 1.0
        assert (draft_logits(wide, wrong) - expected).nan_to_num().abs().max() > 1e-3, name


def test_it_has_the_sizes_of_the_shape(tmp_path: Path) -> None:
    """And what cannot matter is random; only what would leak is zero."""
    small, wide = targets(tied=True)
    size, inner, heads, kv_heads, dim = 192, 224, 12, 3, 32
    attention, read = (heads + 2 * kv_heads) * dim, heads * dim
    shapes = {
        "qkv": (attention, size),
        "output": (size, read),
        "gate_up": (2 * inner, size),
        "down": (size, inner),
    }
    eagle, tiny, medusa, beside = (
        widen_head(load_head(HEADS[kind](tmp_path / kind), small, kind), small, wide, WIDE)
        for kind in ("eagle", "trimmed tiny", "medusa", "beside medusa")
    )
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(tiny).items() if tensor.dim() > 1}
    assert found == shapes
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(eagle).items() if tensor.dim() > 1}
    assert found == shapes | {"qkv": (attention, 2 * size), "fc": (size, 3 * size)}
    assert tuple(tensors_of(medusa)["lm_heads"].shape) == (4, VOCAB, size)
    fc = tensors_of(beside)["fc"].view(size, 5, size)
    assert fc[:, :, HIDDEN:].all() and fc[:HIDDEN].all() and not fc[HIDDEN:, :, :HIDDEN].any()
    assert isinstance(eagle, EagleDrafter) and isinstance(tiny, ModelDrafter) and isinstance(medusa, MedusaDrafter)
    assert eagle.head.weights.lm_head.shape == (len(PART), size) and tiny.part is not None
    assert eagle.head.weights.embedding is wide.weights.embedding
    for name in ("qkv", "gate_up", "fc"):
        tensor = tensors_of(eagle)[name]
        assert tensor[-1, HIDDEN:size].all() and tensor[0, HIDDEN:size].all(), name
    assert not tensors_of(eagle)["fc"][HIDDEN:, :HIDDEN].any() and not tensors_of(eagle)["down"][HIDDEN:].any()
    whole = load_head(HEADS["eagle that knows every token"](tmp_path / "whole"), small, "whole")
    shared = widen_head(whole, small, wide, WIDE)
    assert isinstance(shared, EagleDrafter) and shared.head.weights.lm_head is wide.weights.lm_head


def test_steps_with_all_of_them_take_what_the_small_ones_take(tmp_path: Path) -> None:
    """At a temperature of 5 many drafts are accepted, and any other draft is another text."""
    small, wide = targets(tied=True)
    heads = {name.split()[0]: load_head(make(tmp_path / name), small, name) for name, make in HEADS.items()}
    widened = {name: widen_head(head, small, wide, WIDE) for name, head in heads.items()}
    arms = ["eagle:3", "medusa:2", "tiny:3", "plain", "eagle:6", "trimmed:2", "beside:4"]
    found = [
        [
            ([output.news.token_ids[row] for row in output.rows], output.record.rows)
            for output in open_run(target, PROMPTS, arms, drafters, 40, temperature=5.0, seed=3)
        ]
        for target, drafters in ((small, heads), (wide, widened))
    ]
    assert found[0] == found[1]
    assert sum(row.accepted for _, record in found[0] for row in record) > 20


def test_heads_come_with_the_target_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "wide", WIDE)
    llama(VOCAB, num_hidden_layers=LAYERS).save_pretrained(tmp_path / "target")
    folders = [str(write_eagle(tmp_path / "eagle")), str(write_medusa(tmp_path / "medusa"))]
    loaded, heads = widened_model(str(tmp_path / "target"), "wide", "cpu", "float32", folders)
    assert list(heads) == folders and loaded.model.hidden_size == 192
    assert heads[folders[0]].feature_layers == (2, 3, 4) and heads[folders[1]].feature_layers == (LAYERS + 2,)


def other_drafters(small: Decoder) -> list[Any]:
    own = replace(small.config, hidden_size=32)
    return [NgramDrafter(), ModelDrafter(Decoder(own, replace(small.weights, embedding=torch.zeros(VOCAB, 32))))]


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_no_head_of_the_target_is_refused(number: int) -> None:
    small, wide = targets(tied=True)
    with pytest.raises(FlashSpecError, match="cannot be widened: it is no head of its target's hidden size, 64"):
        widen_head(other_drafters(small)[number], small, wide, WIDE)
