"""An EAGLE head's forward for few tokens on a GPU against the head itself, through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import open_run
from small_heads import PART, VOCAB, write_eagle, write_medusa, write_tiny
from small_models import decoder_of, llama
from torch import Tensor

import flashspec.kernels
from flashspec.drafters.eagle import EagleDrafter, EagleHead, Fusion
from flashspec.drafters.heads import load_head
from flashspec.drafters.medusa import MedusaDrafter
from flashspec.kernels import TRITON_AVAILABLE, decoding, native_build
from flashspec.models.base import Features, KVCache
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder, DecoderConfig

if not TRITON_AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu does this on a GPU", allow_module_level=True)

from flashspec.drafters.eagle_gpu import FewTokensHead, fits
from flashspec.kernels import attention, elementwise, linear, recording, reference_decoder, tiling
from flashspec.models import decoder_gpu

HIDDEN, TARGET_HIDDEN, PARTS, SLOTS = 32, 48, 21, 80
SHAPE = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_context": 128,
    "norm_eps": 1e-2,  # so that a wrong one shows
    "inv_freq": tuple(1 / 100 ** (i / 8) for i in range(8)),
    "windows": (None,),
}


def head_of(**changes: Any) -> EagleHead:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    model = decoder_of(DecoderConfig(**{**SHAPE, **changes}), normal)
    layer = replace(model.weights.layers[0], qkv=normal(128, 2 * HIDDEN))
    weights = replace(model.weights, layers=(layer,), lm_head=normal(PARTS, HIDDEN))
    fusion = Fusion((1, 2, 3), normal(HIDDEN, 3 * TARGET_HIDDEN), 1 + normal(HIDDEN), torch.arange(PARTS))
    head = EagleHead(model.config, weights, fusion)
    head._packed = None  # its weights in q8_0
    return head


def on_the_fast_path(head: EagleHead) -> EagleHead:
    fast = EagleHead(head.config, head.weights, head.fusion)
    fast._packed = None
    fast._few_tokens = fast._fused = FewTokensHead(head.config, head.weights, head._inv_freq, head.fusion)
    return fast


def draft(head: EagleHead, rows: int, window: int) -> tuple[list[torch.Tensor], KVCache]:
    """Logits of a window of text and of two draft tokens after it, over caches full of other things."""
    generator = torch.Generator().manual_seed(1)
    features = Features((1, 2, 3), torch.randn(rows, SLOTS, 3 * TARGET_HIDDEN, generator=generator))
    tokens = torch.randint(0, 50, (rows, SLOTS), generator=generator)
    cache = head.new_cache(rows, SLOTS)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    first = torch.arange(rows)[:, None] * 3 - 1  # row 0 begins at slot 0, twice over
    slots = (first + torch.arange(window)).clamp(min=0)
    fused = head.fuse(features.at((1, 2, 3), slots))
    tip = head.extend(tokens.gather(1, slots + 1), fused, slots, cache, SLOTS)
    logits = [head.predict(tip)]
    drafted = torch.zeros(rows, 3, dtype=torch.int64)
    for offset in (1, 2):
        slots = first + window - 1 + offset
        drafted[:, offset] = logits[-1].argmax(-1)
        tip = head.extend(drafted[:, offset, None], tip[0][:, None], slots, cache, SLOTS)
        logits.append(head.predict(tip))
    return logits, cache


@pytest.mark.parametrize(
    ("rows", "window", "changes"),
    [(1, 9, {}), (3, 4, {"qkv_bias": True, "output_bias": True, "rotary_scale": 1.3}), (17, 4, {})],
    ids=["one row", "biases", "more than a product takes"],
)
def test_it_drafts_as_the_head_itself(
    rows: int, window: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(**changes)
    expected, cache = draft(head, rows, window)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, ours = draft(on_the_fast_path(head), rows, window)
    for ours_now, theirs in zip(found, expected, strict=True):
        assert ours_now.shape == (rows, PARTS) and theirs.isfinite().all()
        torch.testing.assert_close(ours_now, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, cache.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.values, cache.values, rtol=1e-4, atol=1e-5)


def test_the_first_norms_and_waves_in_one_launch_equal_their_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    table, hidden = torch.randn(11, 48), torch.randn(3, 48)
    ids, positions = torch.tensor([[3, 10, 0]]), torch.tensor([[0, 1, 5000]])
    arguments = ids, positions, table, torch.randn(48), hidden, torch.randn(48), torch.rand(6), 1.5, 0.1
    both, waves = elementwise.join(*arguments)
    expected = reference_decoder.join(*arguments)
    torch.testing.assert_close(both, expected[0])
    torch.testing.assert_close(waves, expected[1], rtol=0, atol=1e-6)
    beyond = elementwise.join(torch.tensor([[-1, 11, 2**40]]), *arguments[1:])[0]
    wanted = reference_decoder.join(torch.tensor([[0, 10, 10]]), *arguments[1:])[0]
    torch.testing.assert_close(beyond, wanted)
    column = torch.tensor([[1, 3, 7], [1, 10, 7], [1, 0, 7]])[:, 1, None]  # of a draft
    torch.testing.assert_close(elementwise.join(column, *arguments[1:])[0], expected[0])


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("ahead", [0, 1, 6])
@pytest.mark.parametrize("parts", [(0, 1, 2), (2, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("starts", [None, [0, 3, 16, 0, 6]], ids=["the last", "from"])
def test_what_a_head_reads_of_a_text_in_one_launch(
    size: int, ahead: int, parts: tuple[int, ...], starts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one token, shorter than the window, and up to the end of the cache."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    capacity, lengths = 20, torch.tensor([1, 9, 20, 2, 7])
    tokens = torch.randint(0, 99, (5, capacity + 7))[:, 2:]
    buffer = torch.randn(5, capacity + 3, 3, 40)[:, :capacity]
    start, cached, wanted = None if starts is None else torch.tensor(starts), lengths.clone(), lengths.clone()
    found = recording.recall(tokens, lengths, cached, buffer, parts, start, size, ahead)
    expected = reference_decoder.recall(tokens, lengths, wanted, buffer, parts, start, size, ahead)
    for ours, theirs in zip((*found, cached), (*expected, wanted), strict=True):
        assert torch.equal(ours, theirs)
    token_ids, slots, states, following = found
    assert slots[:, -1].tolist() == (lengths - 2).clamp(min=0).tolist() if starts is None else slots.max() < capacity
    assert torch.equal(states.view(5, size, len(parts), 40)[2, 0, -1], buffer[2, slots[2, 0], parts[-1]])
    assert token_ids[2, 0] == tokens[2, slots[2, 0] + 1]
    assert following[2].tolist() == [19] * ahead and following[3].tolist() == list(range(1, 1 + ahead))
    assert cached[0] == 0 and (cached < lengths).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_states_are_recorded_side_by_side_in_one_launch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    states = [torch.randn(rows * 2, 40) for _ in range(4)]
    positions = torch.arange(rows)[:, None] * 3 + torch.tensor([4, 5])
    found, expected = (torch.zeros(rows, 16, 4, 40) for _ in range(2))
    recording.record(states, positions, found)
    reference_decoder.record(states, positions, expected)
    assert torch.equal(found, expected) and found.count_nonzero() == rows * 2 * 4 * 40
    assert torch.equal(found[-1, positions[-1, 1], 2], states[2][-1])


def test_every_product_is_measured_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And forwards of other sizes are compiled for later."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    measured, multiplied, attended = set[tuple[int, bool]](), list[int](), set[int]()

    def launch(x: Tensor, weight: Tensor, *rest: object, **options: Any) -> None:
        multiplied.append(weight.data_ptr())
        launch_kernel(x, weight, *rest, **options)

    def choose(
        products: Sequence[tuple[Tensor, bool]], run: tiling.Work, keep: bool = True, later: Sequence[tiling.Work] = ()
    ) -> None:
        found = {(weight.data_ptr(), gated) for weight, gated in products}
        if not found <= measured:
            measured.update(found)
            multiplied.clear()
            run()
            assert {place for place, _ in found} <= set(multiplied)
            assert not later or attended == set(tiling.MEASURED)
            for work in later:
                work()

    def attend(qkv: Tensor, _: Tensor, positions: Tensor, keys: Tensor, *rest: object, asked: int = 0) -> Tensor:
        attended.add(positions.shape[1])
        return torch.zeros(
            asked or len(qkv), qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]
        )  # the kernel is slow here

    launch_kernel = linear._launch
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(linear, "_launch", launch)
    monkeypatch.setattr(linear, "IN_NO_CACHE", 0)
    for module in (linear, decoder_gpu):
        monkeypatch.setattr(module, "choose", choose)
    head, decoder = head_of(), decoder_of(DecoderConfig(**SHAPE), torch.randn)
    target = decoder_gpu.FewTokens(decoder.config, decoder.weights, decoder._inv_freq)
    for few_tokens, weights, others in (
        (on_the_fast_path(head)._few_tokens, head.weights, [head.fusion.fc]),
        (target, decoder.weights, []),
    ):
        measured.clear()
        attended.clear()
        few_tokens.tune()
        few_tokens.tune()
        layer = weights.layers[0]
        used = [layer.qkv, layer.output, layer.gate_up, layer.down, weights.lm_head, *others]
        assert measured == {(weight.data_ptr(), weight is layer.gate_up) for weight in used}
        assert attended == {1, 3, 5, 9, 16, 128, 256}


TARGET = llama(VOCAB, num_hidden_layers=7, max_position_embeddings=96)


def target_before(monkeypatch: pytest.MonkeyPatch, fast: bool = True) -> Decoder:
    """A target, and then heads that take this for a GPU if `fast`."""
    config = decoder_config(TARGET.config.to_dict())
    weights = decoder_weights(config, StateDict(TARGET.state_dict()), torch.device("cpu"), torch.float32)
    target = Decoder(config, weights)
    monkeypatch.setattr(decoding, "available", lambda device: fast)
    return target


def test_a_head_from_a_folder_takes_the_fast_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_eagle(tmp_path, PART)
    drafter = load_head(folder, target_before(monkeypatch), "eagle")
    assert isinstance(drafter, EagleDrafter) and isinstance(drafter.head._few_tokens, FewTokensHead)
    assert fits(drafter.head.fusion) and not fits(replace(drafter.head.fusion, fc=torch.zeros(64, 3 * 40)))


@pytest.mark.parametrize("part", [None, PART], ids=["whole", "trimmed"])
def test_medusa_scores_by_few_token_products(
    tmp_path: Path, part: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_medusa(tmp_path, own=False, part=part, beside=True)
    monkeypatch.setattr(decoding, "available", lambda device: True)
    target = target_before(monkeypatch)
    drafter = load_head(folder, target, "medusa")
    assert isinstance(drafter, MedusaDrafter) and drafter.heads.score is not None
    assert drafter.heads.beside is not None
    rows = target.weights.lm_head if part is None else target.weights.lm_head[part]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    projected: list[int] = []
    project = linear.project
    monkeypatch.setattr(linear, "project", lambda x, *rest: projected.append(len(x)) or project(x, *rest))
    states, token_ids = torch.randn(2, 4 * 64), torch.tensor([3, 39])
    hidden = drafter.heads.read(states, token_ids)
    more = torch.cat([states, target.weights.embedding[token_ids]], -1) @ drafter.heads.beside.fc.T
    torch.testing.assert_close(hidden, states[:, 192:] + more, rtol=1e-4, atol=1e-4)
    logits = drafter.heads.logits(hidden, 3)  # (3, 2, V')
    assert projected == [2, 6] and logits.dtype == torch.float32
    ahead = hidden.expand(3, -1, -1)
    for weight, bias in drafter.heads.blocks:
        ahead = ahead + torch.nn.functional.silu(ahead @ weight[:3].mT + bias[:3, None])
    torch.testing.assert_close(logits, ahead @ rows.T, rtol=1e-4, atol=1e-4)


def test_steps_of_every_head_accept_what_they_accept_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temperature of 5 many drafts are accepted, and any other draft is another text."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(flashspec.kernels, "_use_triton", lambda device: False)  # the rest of a step by its twins
    monkeypatch.setattr(native_build, "available", lambda: False)  # its weights would be bfloat16
    folders = {"eagle": write_eagle(tmp_path / "eagle"), "tiny": write_tiny(tmp_path / "tiny", PART)}
    folders["medusa"] = write_medusa(tmp_path / "medusa", own=False, part=PART, beside=True)
    arms = ["eagle:2", "medusa:2", "tiny:2"]

    def decode(fast: bool) -> list[Any]:
        target = target_before(monkeypatch, fast)
        drafters = {name: load_head(folder, target, name) for name, folder in folders.items()}
        run = open_run(target, [[3, 7, 1, 7], [31]], arms, drafters, 9, temperature=5.0, seed=3)
        return [([output.news.token_ids[row] for row in output.rows], output.record.rows) for output in run]

    plain = decode(False)
    assert sum(row.accepted for _, record in plain for row in record) > 2
    assert decode(True) == plain
