"""Log-probabilities out of a verification: the kernel (interpreted on a CPU, for real on a GPU), the twin, the door."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from verification import assert_equals_twin, drawn

from flashspec import kernels
from flashspec.core import Likelihoods
from flashspec.kernels import TRITON_AVAILABLE, native_build, reference_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ["rejection", "coupled", "typical", "greedy"]


@pytest.fixture(params=["triton", "native", "twin"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation the door leads to."""
    way: str = request.param
    if DEVICE == "cuda" and way != "triton":
        pytest.skip("a GPU always runs the kernels")
    if (way == "triton" and not TRITON_AVAILABLE) or (way == "native" and not native_build.available()):
        pytest.skip(native_build.why_not() or "Triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", str(int(way == "triton")))
    if way == "twin":
        monkeypatch.setattr(native_build, "available", lambda: False)
    return way


def small(vocab_size: int = 9, gamma: int = 2, **changes: Any) -> dict[str, Any]:
    """Two rows of a sure target that agrees with the first draft token, and with none in row 1."""
    logits = torch.linspace(-2, 2, vocab_size).repeat(2, gamma + 1, 1)
    logits[..., 3 % vocab_size] = 60.0
    rows = torch.zeros(2, dtype=torch.int64)
    arguments = {
        "target_logits": logits,
        "draft_token_ids": torch.tensor([[3] + [1] * (gamma - 1), [0] * gamma]),
        "draft_lengths": rows + gamma,
        "draft_weights": None,
        "seeds": rows + 5,
        "lengths": rows + 1,
        "temperature": torch.ones(2),
        **changes,
    }
    arguments = {name: None if value is None else value.to(DEVICE) for name, value in arguments.items()}
    return {"likelihoods": Likelihoods.of(arguments["target_logits"]), **arguments}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("variant", VARIANTS)
def test_drawn_problems_have_the_log_probabilities_of_float64(way: str, variant: str, case: int) -> None:
    assert_equals_twin(drawn(case, DEVICE, 10_000, 8 if way == "triton" else 200), variant)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_row_keeps_has_the_log_probability_of_the_raw_logits(way: str, variant: str) -> None:
    """Whatever bends the verdict: temperature and floors change nothing."""
    arguments = small(temperature=torch.tensor([0.5, 0.0]), floors=torch.full((2, 3), 59.0))
    raw = torch.arange(9.0, device=DEVICE).repeat(2, 3, 1)
    arguments["likelihoods"] = Likelihoods.of(raw)
    num_accepted, next_token, _ = kernels.verify_logits(**arguments, variant=variant, epsilon=0.1, delta=0.3)
    assert (num_accepted.tolist(), next_token.tolist()) == ([1, 0], [3, 3])
    total = math.log(sum(math.exp(value) for value in range(9)))
    tokens = arguments["likelihoods"].tokens
    assert [*tokens[0, :2].tolist(), tokens[1, 0].item()] == pytest.approx([3 - total] * 3, abs=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_logits_that_are_not_finite(way: str, variant: str) -> None:
    """Nothing is known of a distribution that holds NaN or +inf; a token at -inf has that log-probability."""
    raw = torch.zeros(2, 3, 9, device=DEVICE)
    raw[0, 0, 8], raw[0, 1, 7], raw[1, 0, 3] = math.nan, math.inf, -math.inf
    arguments = small() | {"likelihoods": Likelihoods.of(raw)}
    kernels.verify_logits(**arguments, variant=variant, epsilon=0.1, delta=0.3)
    tokens: Tensor = arguments["likelihoods"].tokens
    assert tokens[0, :2].isnan().all() and tokens[1, 0] == -math.inf
    assert arguments["likelihoods"].totals[1, 0].item() == pytest.approx(math.log(8), abs=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vocabulary_of_one_token(way: str, variant: str) -> None:
    arguments = small(1, draft_token_ids=torch.tensor([[0, 0], [0, 2**40]]))
    assert_equals_twin(arguments, variant)
    assert (arguments["likelihoods"].tokens[0] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_without_a_draft_and_one_without_rows(way: str) -> None:
    token_ids = torch.zeros(2, 0, dtype=torch.int64)
    arguments = small(gamma=1) | {"draft_token_ids": token_ids.to(DEVICE)}
    arguments["target_logits"] = arguments["target_logits"][:, :1]
    arguments |= {
        "draft_lengths": torch.zeros_like(arguments["seeds"]),
        "likelihoods": Likelihoods.of(arguments["target_logits"]),
    }
    assert_equals_twin(arguments, "rejection")
    nobody = {name: None if value is None else value[:0] for name, value in arguments.items() if name != "likelihoods"}
    kernels.verify_logits(**nobody, variant="greedy", likelihoods=Likelihoods.of(nobody["target_logits"]))


def test_a_token_is_never_more_than_certain() -> None:
    logits = 40 * torch.randn(50, 1, 300, generator=torch.Generator().manual_seed(1))
    likelihoods = Likelihoods.of(logits)
    reference_fused.weigh(likelihoods, torch.zeros(50, 0).long(), torch.zeros(50).long(), logits[:, 0].argmax(-1))
    assert (likelihoods.tokens <= 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the arguments stand on a CPU")
@pytest.mark.parametrize(
    ("likelihoods", "message"),
    [
        (Likelihoods.of(torch.zeros(2, 3, 8)), r"likelihoods.logits should have shape \(2, 3, 9\)"),
        (Likelihoods.of(torch.zeros(2, 3, 9).double()), "likelihoods.logits should be torch.float32 or"),
        (
            Likelihoods(torch.zeros(2, 3, 9), torch.zeros(2, 2), torch.zeros(2, 3)),
            r"likelihoods.tokens should have shape \(2, 3\)",
        ),
        (
            Likelihoods(torch.zeros(2, 3, 9), torch.zeros(2, 3), torch.zeros(3, 2).T),
            "likelihoods.totals is written in place",
        ),
    ],
)
def test_the_door_names_what_is_wrong(likelihoods: Likelihoods, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.verify_logits(**(small() | {"likelihoods": likelihoods}), variant="greedy")
