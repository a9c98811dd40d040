"""Kernel against twin: through Triton's interpreter on a CPU (see conftest.py), for real on a GPU."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flashspec.kernels import TRITON_AVAILABLE, native_build, native_step, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if TRITON_AVAILABLE:
    from flashspec.kernels import gather, noise, score, verify


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads the variable again at its first launch."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


needs_triton = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")


def draft_of(batch_size: int, gamma: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Log-probabilities close enough together that half of the tokens pass."""
    generator = torch.Generator().manual_seed(vocab_size + gamma)
    draft = torch.randn(batch_size, gamma, vocab_size, generator=generator).log_softmax(-1)
    target = draft + torch.randn(batch_size, gamma, vocab_size, generator=generator)
    u = torch.rand(batch_size, gamma, generator=generator)
    ids = torch.randint(0, vocab_size, (batch_size, gamma), generator=generator)
    return draft.to(DEVICE, dtype), target.to(DEVICE, dtype), u.to(DEVICE), ids.to(DEVICE)


def assert_verify_equal(*arguments: Tensor) -> Tensor:
    accepted, first_rejection = verify.verify_tokens(*arguments)
    expected_accepted, expected_first_rejection = reference.verify_tokens(*arguments)
    assert torch.equal(accepted, expected_accepted)
    assert torch.equal(first_rejection, expected_first_rejection)
    assert first_rejection.dtype == expected_first_rejection.dtype
    return first_rejection


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch_size", "gamma", "vocab_size"),
    [
        (40, 1, 100),
        (40, 5, 100),
        (8, 16, 100),
        (6, 4, 8193),
        (6, 7, 10_000),
        (4, 4, 32_000),
        (1, 3, 128_256),
        (1, 3, 151_936),
        (2, 0, 100),
        (0, 3, 100),
    ],
)
def test_verify_equals_its_twin(batch_size: int, gamma: int, vocab_size: int, dtype: torch.dtype) -> None:
    arguments = draft_of(batch_size, gamma, vocab_size, dtype)
    first_rejection = assert_verify_equal(*arguments)
    kept = gather.gather_accepted(arguments[3], first_rejection)
    assert torch.equal(kept, reference.gather_accepted(arguments[3], first_rejection))


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy, which announces log(0)
def test_verify_equals_its_twin_on_every_edge() -> None:
    values = torch.tensor([-math.inf, -20.0, -1.0, math.log(0.5), 0.0, math.nan], device=DEVICE)
    uniforms = torch.tensor([0.0, 1e-38, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0, math.nan], device=DEVICE)
    draft, target, u = torch.cartesian_prod(values, values, uniforms).unbind(1)
    ids = torch.zeros(len(u), 1, dtype=torch.int64, device=DEVICE)
    assert_verify_equal(draft.view(-1, 1, 1), target.view(-1, 1, 1), u.view(-1, 1), ids)


@needs_triton
def test_verify_equals_its_twin_where_one_bit_decides() -> None:
    """log u against itself and its neighbours, for u whose float32 logarithm is not the nearest one."""
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    u = u[u.log() != u.double().log().float()][:40].unsqueeze(1)
    log_u = u.double().log().float()
    zero = torch.zeros(len(u), 1, 1, device=DEVICE)
    ids = torch.zeros(len(u), 1, dtype=torch.int64, device=DEVICE)
    assert len(u) > 0
    above, below = (torch.nextafter(log_u, torch.full_like(log_u, end)) for end in (math.inf, -math.inf))
    for target, passes in ((above, 1), (log_u, 0), (below, 0)):
        assert (assert_verify_equal(zero, target.unsqueeze(2), u, ids) == passes).all()


@needs_triton
def test_verify_takes_any_strides() -> None:
    draft, target, u, ids = draft_of(6, 4, 50, torch.float32)
    strided = torch.stack([draft, draft], dim=-1)[..., 0]
    transposed = target.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    repeated = u.t().contiguous().t(), ids.t().contiguous().t()
    expected = reference.verify_tokens(draft, target, u, ids)
    for actual, wanted in zip(verify.verify_tokens(strided, transposed, *repeated), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(gather.gather_accepted(repeated[1], expected[1]), reference.gather_accepted(ids, expected[1]))


@needs_triton
@pytest.mark.parametrize("outside", [-1, 50, 2**40])
def test_an_id_outside_the_vocabulary_is_rejected_unread(outside: int) -> None:
    logprobs = torch.zeros(1, 3, 50, device=DEVICE)
    ids = torch.tensor([[1, outside, 1]], device=DEVICE)
    assert assert_verify_equal(logprobs, logprobs, torch.full((1, 3), 0.5, device=DEVICE), ids).item() == 1


@needs_triton
def test_uniforms_have_the_bits_of_their_twin() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63)], device=DEVICE)
    positions = torch.tensor([[0, 1, 2**31, 2**32 + 3, -1]], device=DEVICE).expand(4, 5)
    for purpose in (0, 1, 2**32 - 1):
        expected = reference.philox_uniform(seeds, positions, purpose)
        assert torch.equal(noise.philox_uniform(seeds, positions, purpose), expected)
    many = torch.arange(300, device=DEVICE).view(2, 150)
    expected = reference.philox_uniform(seeds[:2], many, 5)
    assert torch.equal(noise.philox_uniform(seeds[:2], many, 5), expected)


@needs_triton
@pytest.mark.parametrize("vocab_size", [1, 100, 4096, 8193])
def test_gumbel_noise_equals_its_twin_within_rounding(vocab_size: int) -> None:
    seeds, positions = torch.tensor([7, -7], device=DEVICE), torch.tensor([[3], [2**33]], device=DEVICE)
    actual = noise.philox_gumbel(seeds, positions, 6, vocab_size)
    expected = reference.philox_gumbel(seeds, positions, 6, vocab_size)
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=5e-7)


@needs_triton
def test_no_positions_launch_nothing() -> None:
    seeds = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    positions = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert noise.philox_uniform(seeds, positions, 0).shape == (2, 0)
    assert noise.philox_gumbel(seeds, positions, 0, 9).shape == (2, 0, 9)


@needs_triton
def test_the_door_runs_the_kernels_and_not_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashspec import kernels

    monkeypatch.setattr(kernels, "reference", None)
    draft, target, u, ids = draft_of(2, 3, 10, torch.float32)
    _, first_rejection = kernels.verify_tokens(draft, target, u, ids)
    assert kernels.gather_accepted(ids, first_rejection).shape == (2, 3)
    assert kernels.philox_uniform(ids[:, 0], ids, 0).shape == (2, 3)
    assert kernels.philox_gumbel(ids[:, 0], ids, 0, 5).shape == (2, 3, 5)


def test_everything_works_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from flashspec import kernels
logprobs, ids = torch.zeros(1, 2, 4), torch.tensor([[3, 1]])
u = kernels.philox_uniform(torch.tensor([1]), ids, 0)
_, first_rejection = kernels.verify_tokens(logprobs, logprobs, u, ids)
print(kernels.TRITON_AVAILABLE, kernels.gather_accepted(ids, first_rejection).tolist())
print(tuple(kernels.philox_gumbel(torch.tensor([1]), ids, 0, 7).shape))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["False [[3, 1]]", "(1, 2, 7)"], done.stderr


@needs_triton
@pytest.mark.parametrize(("gamma", "capacity"), [(0, 40), (1, 40), (4, 40), (5, 9), (17, 12)])
def test_the_window_is_the_last_token_and_the_draft(gamma: int, capacity: int) -> None:
    tokens = torch.arange(60, device=DEVICE).view(3, 20)[:, :18]
    lengths = torch.tensor([1, 7, 11], device=DEVICE)
    draft = 100 + torch.arange(6 * gamma, device=DEVICE).view(3, 2 * gamma)[:, :gamma]
    counts = [torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    expected = reference.window(tokens, lengths, draft, capacity, counts[0])
    native = [native_step.window] if DEVICE == "cpu" and native_build.available() else []
    for window in (score.window, *native):
        found = window(tokens, lengths, draft, capacity, counts[1].zero_())
        assert all(map(torch.equal, (*found, counts[1]), (*expected, counts[0])))
    assert expected[0][1].tolist() == [26, *draft[1].tolist()] and expected[1][0].max() < capacity
