"""Verification on a CPU: the native kernel decides as its PyTorch twin does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashspec.kernels import native_build, reference_fused, verify_logits
from flashspec.kernels.native_verify import verify_logits as native_verify_logits

pytestmark = pytest.mark.skipif(not native_build.available(), reason=native_build.why_not() or "built")
VARIANTS = ("rejection", "coupled", "greedy")


def arguments(seed: int, vocab_size: int, gamma: int, one_hot: bool) -> tuple[Tensor | None, ...]:
    """Four ragged rows at four temperatures, drafts drawn from near the target."""
    random = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(4, gamma + 1, vocab_size, generator=random)
    draft = target[:, :-1] + torch.randn(4, gamma, vocab_size, generator=random)
    token_ids = draft.softmax(-1).flatten(0, 1).multinomial(1, generator=random).view(4, gamma)
    if one_hot:
        token_ids = torch.where(torch.rand(4, gamma, generator=random) < 0.6, target[:, :-1].argmax(-1), token_ids)
    lengths = torch.randint(gamma + 1, (4,), generator=random)
    seeds, places = torch.randint(2**62, (2, 4), generator=random)
    temperature = torch.tensor([0.0, 0.3, 1.0, 1.7])
    return target, token_ids, lengths, None if one_hot else draft, seeds, places, temperature


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert torch.equal(found[2], expected[2])
    sound = ~expected[2]
    assert torch.equal(found[0][sound], expected[0][sound])
    assert torch.equal(found[1][sound], expected[1][sound])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("vocab_size", [2, 100, 1000, 8193])
def test_decisions_are_the_twins(vocab_size: int, one_hot: bool, variant: str) -> None:
    accepted = 0
    for seed in range(20):
        inputs = arguments(seed, vocab_size, seed % 5 + 1, one_hot)
        found = native_verify_logits(*inputs, variant)
        assert_same(found, reference_fused.verify_logits(*inputs, variant))
        assert int(found[1].min()) >= 0 and int(found[1].max()) < vocab_size
        accepted += int(found[0].sum())
    assert accepted > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_strange_numbers_and_ids_are_treated_alike(variant: str) -> None:
    for seed in range(20):
        target, token_ids, lengths, draft, *rest = arguments(seed, 130, 3, one_hot=False)
        target[0, seed % 4, 7] = float("nan")
        target[1, seed % 4, 7] = float("inf")
        target[2, seed % 4] = -float("inf")
        target[3, :, 5:] = -float("inf")
        draft[3, seed % 3, 1] = float("nan")
        token_ids[3, 0] = (-1, 130)[seed % 2]
        inputs = (target, token_ids, lengths, draft, *rest)
        assert_same(native_verify_logits(*inputs, variant), reference_fused.verify_logits(*inputs, variant))


def test_the_door_takes_other_dtypes_and_strides() -> None:
    target, token_ids, lengths, draft, *rest = arguments(3, 500, 4, one_hot=False)
    half = (target.bfloat16(), token_ids, lengths, draft.bfloat16(), *rest)
    assert_same(verify_logits(*half, "rejection"), reference_fused.verify_logits(*half, "rejection"))
    spread = (target.repeat(1, 1, 2)[..., ::2], token_ids, lengths, draft.transpose(0, 1).contiguous().transpose(0, 1))
    assert_same(verify_logits(*spread, *rest, "rejection"), reference_fused.verify_logits(*spread, *rest, "rejection"))


def test_nothing_left_to_draw_falls_back_to_the_target() -> None:
    """p = q: a rejection has an empty residual."""
    logits = torch.zeros(1, 2, 64)
    token = torch.tensor([[5]])
    seen = set()
    for seed in range(50):
        inputs = (logits, token, torch.tensor([1]), logits[:, :1], torch.tensor([seed]), torch.tensor([9]))
        inputs = (*inputs, torch.ones(1))
        found = native_verify_logits(*inputs, "rejection")
        assert_same(found, reference_fused.verify_logits(*inputs, "rejection"))
        seen.add(int(found[1]))
    assert len(seen) > 20
