"""One round outside the engine, and the verdicts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from statistics_of_text import g_test
from torch import Tensor

from flashspec.kernels import verify_logits
from flashspec.sampling import Sample, rejection_sample, typical_sample

GAMMA, VOCAB = 2, 5
ALPHA = 0.001


def round_of(rows: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids, draft and target log-probabilities that do not depend on the row, drafts drawn from theirs."""
    generator = torch.Generator().manual_seed(1)
    draft = (sharpness * torch.randn(GAMMA, VOCAB, generator=generator)).log_softmax(-1)
    target = (sharpness * torch.randn(GAMMA + 1, VOCAB, generator=generator)).log_softmax(-1)
    drawn = [torch.multinomial(row.exp(), rows, replacement=True, generator=generator) for row in draft]
    input_ids = torch.zeros(rows, 3, dtype=torch.int64)
    return input_ids, draft.expand(rows, -1, -1), target.expand(rows, -1, -1), torch.stack(drawn, 1)


@pytest.mark.parametrize("sample", [rejection_sample, typical_sample])
def test_shapes_and_padding(sample: Callable[..., Sample]) -> None:
    torch.manual_seed(0)
    arguments = round_of(200, sharpness=3.0)
    token_ids, num_accepted = sample(*arguments, GAMMA)
    assert token_ids.shape == (200, GAMMA + 1) and token_ids.dtype == torch.int64 and num_accepted.shape == (200,)
    assert set(num_accepted.tolist()) == {0, 1, 2}
    for ids, count, draft in zip(token_ids.tolist(), num_accepted.tolist(), arguments[3].tolist(), strict=True):
        assert ids[:count] == draft[:count]
        assert 0 <= ids[count] < VOCAB
        assert ids[count + 1 :] == [-1] * (GAMMA - count)


@pytest.mark.parametrize("sample", [rejection_sample, typical_sample])
@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (1, (4, GAMMA + 1, VOCAB), r"draft_logprobs has shape \(4, 3, 5\); it should be \(4, 2, 5\)"),
        (1, (4, GAMMA, VOCAB + 1), "draft_logprobs"),
        (2, (4, GAMMA, VOCAB), r"target_logprobs has shape \(4, 2, 5\); it should be \(4, 3, 5\)"),
        (2, (3, GAMMA + 1, VOCAB), "target_logprobs"),
        (3, (4, GAMMA + 1), r"draft_token_ids has shape \(4, 3\); it should be \(4, 2\)"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(
    sample: Callable[..., Sample], place: int, shape: tuple[int, ...], message: str
) -> None:
    arguments = list(round_of(4))
    arguments[place] = torch.zeros(shape, dtype=arguments[place].dtype)
    with pytest.raises(ValueError, match=message):
        sample(*arguments, GAMMA)


def test_rejection_emits_the_targets_distribution() -> None:
    torch.manual_seed(1)
    rows = 40_000
    arguments = round_of(rows)
    token_ids, num_accepted = rejection_sample(*arguments, GAMMA)
    target = arguments[2][0].double().exp()
    assert g_test(token_ids[:, :1], target[0]) > ALPHA
    assert g_test(token_ids[num_accepted >= 1][:, 1:2], target[1]) > ALPHA
    assert g_test(token_ids[num_accepted == 2][:, 2:], target[2]) > ALPHA
    overlap = torch.minimum(target[:GAMMA], arguments[1][0].double().exp()).sum(-1)
    assert float(num_accepted.double().mean()) == pytest.approx(float(overlap[0] * (1 + overlap[1])), abs=0.015)


def test_rejection_sample_follows_torchs_generator() -> None:
    arguments = round_of(50)
    torch.manual_seed(5)
    first = rejection_sample(*arguments, GAMMA)
    torch.manual_seed(5)
    assert torch.equal(rejection_sample(*arguments, GAMMA).token_ids, first.token_ids)
    assert not torch.equal(rejection_sample(*arguments, GAMMA).token_ids, first.token_ids)


@pytest.mark.parametrize(
    ("probs", "token_id", "accepted"),
    [
        # uniform over four: entropy log 4, so the threshold is min(0.09, 0.3 / 4 = 0.075)
        ([0.25, 0.25, 0.25, 0.25], 2, True),
        # entropy 0.327: the threshold is epsilon
        ([0.92, 0.08, 0.0, 0.0], 1, False),
        ([0.90, 0.10, 0.0, 0.0], 1, True),
        ([1.0, 0.0, 0.0, 0.0], 1, False),
        ([1.0, 0.0, 0.0, 0.0], 0, True),
    ],
)
def test_typical_accepts_by_its_rule(probs: list[float], token_id: int, accepted: bool) -> None:
    logits = torch.tensor([[probs, [0.0, 0.0, 0.0, 1.0]]]).log()  # (1, 2, 4)
    one = torch.ones(1, dtype=torch.int64)
    num_accepted, next_token, _ = verify_logits(
        logits, one[:, None] * token_id, one, None, one, 4 * one, one.float(), "typical", None, 0.09, 0.3
    )
    assert num_accepted.tolist() == [int(accepted)]
    if accepted:
        assert next_token.tolist() == [3]
    else:
        assert probs[next_token[0]] > 0


def test_typical_thresholds_are_arguments() -> None:
    target = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    arguments = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 2), target, torch.tensor([[1]])
    assert typical_sample(*arguments, 1).num_accepted.tolist() == [1]
    assert typical_sample(*arguments, 1, epsilon=0.2, delta=1.0).num_accepted.tolist() == [0]
    assert typical_sample(*arguments, 1, epsilon=0.2, delta=0.1).num_accepted.tolist() == [1]


def test_typical_draws_the_next_token_from_the_target() -> None:
    torch.manual_seed(2)
    arguments = round_of(30_000)
    token_ids, num_accepted = typical_sample(*arguments, GAMMA)
    after = token_ids[num_accepted == 2][:, 2:]
    assert g_test(after, arguments[2][0, 2].double().exp()) > ALPHA
