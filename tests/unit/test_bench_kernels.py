from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashspec.bench import kernels
from flashspec.core import FlashSpecError
from flashspec.kernels import verify_logits

SHAPE = (3, 2, 50)


def timer(durations: list[float]) -> Callable[[Callable[[int], Any]], tuple[float, float]]:
    """Runs what it is given, and reads its durations from a list."""
    left = iter(durations)

    def time(call: Callable[[int], Any]) -> tuple[float, float]:
        call(0)
        call(1)
        return next(left), 0.5

    return time


def test_a_row_holds_bytes_time_and_both_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    row = kernels._verification(SHAPE, torch.bfloat16, "cpu", 1e9, 10, timer([4.0, 6.0, 20.0]))
    assert row["bytes"] == 3 * 5 * 50 * 2
    assert row["floor_microseconds"] == 1.5
    assert (row["microseconds"], row["cold_microseconds"], row["pytorch_microseconds"]) == (4.0, 6.0, 20.0)
    assert (row["roofline_share"], row["speedup_vs_pytorch"], row["dtype"]) == (0.25, 5.0, "bfloat16")


def test_the_acceptance_test_is_compared_with_its_twin() -> None:
    row = kernels._acceptance_test(SHAPE, torch.float32, "cpu", timer([2.0, 5.0]))
    assert (row["kernel"], row["speedup_vs_pytorch"]) == ("verify_tokens", 2.5)


def test_flashinfer_takes_probabilities_of_both() -> None:
    inputs = kernels.verification_inputs(SHAPE, torch.bfloat16, "cpu", 0)
    draft, ids, target = kernels.flashinfer_verify(lambda *arguments: arguments, inputs)
    assert ids.dtype == torch.int32
    for probs in (draft, target):
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_the_baseline_verifies_as_we_do() -> None:
    """Different random numbers, the same rates: the mean number accepted over 4,000 rows."""
    inputs = kernels.verification_inputs((4000, 2, 20), torch.float32, "cpu", 0)
    theirs, token_ids = kernels.pytorch_verify(inputs)
    ours, _, failed = verify_logits(**inputs, variant="rejection")
    assert not failed.any() and token_ids.min() >= 0 and token_ids.max() < 20
    assert abs(theirs.double().mean() - ours.double().mean()) < 0.06  # three standard errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(FlashSpecError, match="this machine has no CUDA device"):
        kernels.run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_measures_every_shape() -> None:
    result = kernels.run(None, [2], [1, 3], [1000], [torch.float32], replays=3, calls=2)
    assert [row["gamma"] for row in result["rows"]] == [1, 1, 3, 3]
    assert all(row["microseconds"] > 0 for row in result["rows"])
