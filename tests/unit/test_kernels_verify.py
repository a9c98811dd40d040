import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashspec.kernels import gather_accepted, philox_uniform, verify_tokens

INF, NAN = math.inf, math.nan


def one_position(draft: float, target: float, u: float) -> bool:
    """The decision on token 1 of three whose log-probabilities are `draft` and `target`."""
    draft_logprobs = torch.tensor([[[-1.0, draft, -1.0]]])
    target_logprobs = torch.tensor([[[-1.0, target, -1.0]]])
    accepted, first_rejection = verify_tokens(draft_logprobs, target_logprobs, torch.tensor([[u]]), torch.tensor([[1]]))
    assert accepted.sum() == first_rejection
    return bool(accepted)


@pytest.mark.parametrize(
    ("draft", "target", "u", "expected"),
    [
        (math.log(0.5), math.log(0.25), 0.49, True),
        (math.log(0.5), math.log(0.25), 0.51, False),
        (math.log(0.25), math.log(0.5), 0.999, True),
        (-1.0, -1.0, 0.999, True),
        (-1.0, -1.0, 1.0, False),
        (-1.0, -2.0, 0.0, True),
        (-1.0, -INF, 0.0, False),
        (-1.0, -INF, 1e-30, False),
        (-INF, -1.0, 0.999, True),
        (-INF, -INF, 0.0, False),
        (NAN, -1.0, 0.1, False),
        (-1.0, NAN, 0.1, False),
        (-1.0, -1.0, NAN, False),
    ],
)
def test_the_decision_on_one_token(draft: float, target: float, u: float, expected: bool) -> None:
    assert one_position(draft, target, u) is expected


def test_the_comparison_is_strict_and_in_float32() -> None:
    log_half = torch.tensor(0.5).double().log().float()
    above = torch.nextafter(log_half, torch.tensor(0.0))
    assert not one_position(0.0, log_half.item(), 0.5)
    assert one_position(0.0, above.item(), 0.5)


def test_nothing_is_kept_after_the_first_rejection() -> None:
    logprobs = torch.full((3, 4, 5), -1.0)
    u = torch.tensor([[0.5, 0.5, 1.0, 0.5], [1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    ids = torch.arange(12).view(3, 4) % 5
    accepted, first_rejection = verify_tokens(logprobs, logprobs, u, ids)
    assert accepted.tolist() == [[True, True, False, True], [False, True, True, True], [True] * 4]
    assert first_rejection.tolist() == [2, 0, 4]
    assert (accepted.dtype, first_rejection.dtype) == (torch.bool, torch.int32)
    assert gather_accepted(ids, first_rejection).tolist() == [[0, 1, -1, -1], [-1] * 4, [3, 4, 0, 1]]


@pytest.mark.parametrize("gamma", [1, 2, 7, 16])
def test_a_loop_over_scalars_decides_the_same(gamma: int) -> None:
    generator = torch.Generator().manual_seed(gamma)
    draft, target = torch.randn(2, 6, gamma, 11, generator=generator).log_softmax(-1)
    u = torch.rand(6, gamma, generator=generator)
    ids = torch.randint(0, 11, (6, gamma), generator=generator)
    accepted, first_rejection = verify_tokens(draft, target, u, ids)
    for row in range(6):
        ratios = [math.exp(target[row, i, ids[row, i]] - draft[row, i, ids[row, i]]) for i in range(gamma)]
        passed = [float(u[row, i]) < ratios[i] for i in range(gamma)]
        assert accepted[row].tolist() == passed
        assert first_rejection[row] == ([*passed, False]).index(False)


@pytest.mark.parametrize(("batch_size", "gamma"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_verify(batch_size: int, gamma: int) -> None:
    logprobs = torch.zeros(batch_size, gamma, 7)
    ids = torch.zeros(batch_size, gamma, dtype=torch.int64)
    accepted, first_rejection = verify_tokens(logprobs, logprobs, torch.zeros(batch_size, gamma), ids)
    assert accepted.shape == (batch_size, gamma)
    assert first_rejection.tolist() == [0] * batch_size
    assert gather_accepted(ids, first_rejection).shape == (batch_size, gamma)


def verify_arguments() -> dict[str, Tensor]:
    return {
        "draft_logprobs": torch.zeros(2, 3, 5),
        "target_logprobs": torch.zeros(2, 3, 5),
        "u": torch.full((2, 3), 0.5),
        "draft_token_ids": torch.zeros(2, 3, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("draft_logprobs", torch.zeros(2, 3), r"draft_logprobs should be \(B, γ, V\)"),
        ("draft_logprobs", torch.zeros(2, 3, 0), r"draft_logprobs should be \(B, γ, V\) with V >= 1"),
        ("draft_logprobs", torch.zeros(2, 3, 5).half(), "draft_logprobs should be torch.float32 or"),
        ("target_logprobs", torch.zeros(2, 4, 5), r"target_logprobs .* \(2, 3, 5\): got \(2, 4, 5\)"),
        ("target_logprobs", torch.zeros(2, 3, 5, device="meta"), "target_logprobs should be on cpu"),
        ("u", torch.zeros(2, 2), "u should have shape"),
        ("u", torch.zeros(2, 3).double(), "u should be torch.float32"),
        ("draft_token_ids", torch.zeros(2, 3).int(), "draft_token_ids should be torch.int64"),
        ("draft_token_ids", torch.full((2, 3), 5), r"draft_token_ids should be in \[0, 5\)"),
        ("draft_token_ids", torch.full((2, 3), -1), r"draft_token_ids should be in \[0, 5\)"),
    ],
)
def test_verify_tokens_names_what_is_wrong(name: str, wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify_tokens(**verify_arguments() | {name: wrong})


@pytest.mark.parametrize(
    ("token_ids", "first_rejection", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3).int(), "token_ids should be"),
        (torch.zeros(2, 3), torch.zeros(2).int(), "token_ids should be torch.int64"),
        (torch.zeros(2, 3).long(), torch.zeros(3).int(), "first_rejection should have shape"),
        (torch.zeros(2, 3).long(), torch.zeros(2), "first_rejection should be torch.int32 or torch.int64"),
    ],
)
def test_gather_accepted_names_what_is_wrong(token_ids: Tensor, first_rejection: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_accepted(token_ids, first_rejection)


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():
        arguments = verify_arguments()
        _, first_rejection = verify_tokens(**arguments)
        gather_accepted(arguments["draft_token_ids"], first_rejection)


Verifier = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def acceptance_z(verify: Verifier) -> float:
    """Standard errors between the acceptance frequency of 40,000 tokens drawn from q and sum(min(p, q))."""
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    draft, target = torch.randn(2, 8, generator=generator).softmax(-1)
    ids = torch.multinomial(draft, n, replacement=True, generator=generator).view(n, 1)
    u = philox_uniform(torch.tensor([5]), torch.arange(n).view(1, n), purpose=1).view(n, 1)
    draft_logprobs, target_logprobs = (probs.log().expand(n, 1, 8) for probs in (draft, target))
    _, first_rejection = verify(draft_logprobs, target_logprobs, u, ids)
    rate = torch.minimum(draft, target).sum()
    return float((first_rejection.double().mean() - rate) / (rate * (1 - rate) / n).sqrt())


def test_the_acceptance_frequency_is_the_overlap_of_the_distributions() -> None:
    assert abs(acceptance_z(verify_tokens)) < 3.5


def test_a_verifier_with_p_and_q_swapped_is_caught() -> None:
    assert abs(acceptance_z(lambda draft, target, u, ids: verify_tokens(target, draft, u, ids))) > 10
