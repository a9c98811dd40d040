import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashspec.bench import cases, kernels
from flashspec.bench.cases import FAMILIES, Grid
from flashspec.bench.report import kind_of
from flashspec.bench.shapes import Shape
from flashspec.bench.timing import Timer, make_timer
from flashspec.core import FlashSpecError
from flashspec.kernels import verify_logits

SHAPE = (3, 2, 50)


GRID = Grid(
    batch_sizes=[3],
    gammas=[2],
    vocab_sizes=[50],
    dtypes=[torch.bfloat16],
    shapes=[Shape("tiny", 64, 96, 4, 2, 16, 1, 50)],
    tokens=[3],
    prompts=[],
    context=32,
    device="cpu",
)


def timer(durations: list[float]) -> Timer:
    """Runs what it is given, and reads its durations from a list."""
    left = iter(durations)

    def time(call: Callable[[int], Any], before: Callable[[], Any] | None = None, /) -> tuple[float, float]:
        for index in range(cases.MOST_SETS):
            call(index)
        return next(left), 0.5

    return time


def test_a_row_holds_bytes_time_and_both_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    (case,) = FAMILIES["verify_logits"](GRID)
    row = kernels.measure(case, 1e9, timer([4.0, 20.0]), timer([6.0]))
    assert (row["bytes"], case.sets) == (3 * 5 * 50 * 2, cases.MOST_SETS)
    assert row["floor_microseconds"] == 1.5
    assert (row["microseconds"], row["cold_microseconds"], row["pytorch_microseconds"]) == (4.0, 6.0, 20.0)
    assert (row["roofline_share"], row["speedup_vs_pytorch"], row["dtype"]) == (0.25, 5.0, "bfloat16")
    assert row["tb_per_second"] == 0.0 and row["batch_size"] == 3


def test_the_acceptance_test_is_compared_with_its_twin() -> None:
    (case,) = FAMILIES["verify_tokens"](GRID)
    row = kernels.measure(case, 1e9, timer([2.0, 5.0]), timer([]))
    assert (row["kernel"], row["speedup_vs_pytorch"]) == ("verify_tokens", 2.5)
    assert "roofline_share" not in row


def test_every_family_makes_cases_that_run() -> None:
    for family in FAMILIES.values():
        for case in family(GRID):
            row = kernels.measure(case, 1e9, make_timer("cpu", 1, 1), make_timer("cpu", 1, case.sets))
            assert row["microseconds"] > 0 and row["speedup_vs_pytorch"] > 0


def test_products_read_every_matrix_and_agree_with_pytorch() -> None:
    found = list(FAMILIES["product"](GRID))
    assert [case.names["shape"].split()[1] for case in found] == ["qkv", "output", "gate_up", "down", "lm_head"]
    assert sum(case.n_bytes for case in found) == 2 * GRID.shapes[0].step_size
    for case in found:
        torch.testing.assert_close(case.ours(1), case.baselines["pytorch"](1), atol=1e-3, rtol=2e-2)


def test_attention_reads_keys_and_values_once() -> None:
    (case,) = FAMILIES["attention"](GRID)
    assert (case.n_bytes, case.names["context"]) == (2 * 3 * 2 * 32 * 16 * 2, 32)
    assert case.ours(0).shape == (9, 64) and case.baselines["pytorch"](0).shape == (3, 4, 3, 16)


@pytest.mark.parametrize("tokens", [1, 3])
def test_pytorch_attends_to_what_it_should(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, asked = torch.nn.functional.scaled_dot_product_attention, list[Any]()

    def noted(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((*tensors, options["attn_mask"]))
        return attend(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    (case,) = FAMILIES["attention"](replace(GRID, tokens=[tokens]))
    found = case.baselines["pytorch"](0)
    queries, keys, values, mask = asked[0]
    assert (mask is None) == (tokens == 1)
    visible = torch.arange(32) <= torch.arange(32 - tokens, 32)[:, None]
    torch.testing.assert_close(found, attend(queries, keys, values, attn_mask=visible, enable_gqa=True))


def test_weights_are_cold_for_everyone() -> None:
    case = next(FAMILIES["product"](GRID))
    row = kernels.measure(case, 1e9, timer([]), timer([4.0, 6.0]))
    assert (row["microseconds"], row["cold_microseconds"], row["speedup_vs_pytorch"]) == (4.0, 4.0, 1.5)


class Sampling:
    """As much of `flashinfer.sampling` 0.6 as is called: its arguments, their shapes and dtypes."""

    @staticmethod
    def softmax(logits: torch.Tensor, temperature: torch.Tensor | None = None) -> torch.Tensor:
        assert logits.dim() == 2 and (temperature is None or temperature.shape == logits.shape[:1])
        return (logits.float() / (1.0 if temperature is None else temperature[:, None])).softmax(-1)

    @staticmethod
    def chain_speculative_sampling(
        draft_probs: torch.Tensor,
        draft_token_ids: torch.Tensor,
        target_probs: torch.Tensor,
        *,
        seed: torch.Tensor,
        offset: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        batch_size, gamma = draft_token_ids.shape
        assert draft_token_ids.dtype == torch.int32 and seed.dtype == offset.dtype == torch.int64
        assert seed.shape == offset.shape == (batch_size,)
        assert (draft_probs.shape[:2], target_probs.shape[:2]) == ((batch_size, gamma), (batch_size, gamma + 1))
        return draft_probs, target_probs


def test_flashinfer_is_measured_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: name)
    monkeypatch.setattr(cases, "import_module", lambda name: Sampling)
    (case,) = FAMILIES["verify_logits"](GRID)
    row = kernels.measure(case, 1e9, timer([4.0, 20.0, 8.0]), timer([6.0]))
    assert (row["flashinfer_microseconds"], row["speedup_vs_flashinfer"]) == (8.0, 2.0)


def test_flashinfer_takes_the_same_probabilities_as_pytorch() -> None:
    inputs = cases.verification_inputs(SHAPE, torch.bfloat16, "cpu", 0)
    draft, target = cases.flashinfer_verify(Sampling, cases.flashinfer_inputs(inputs))
    expected = (inputs.target_logits.float() / inputs.temperature[:, None, None]).softmax(-1)
    torch.testing.assert_close((draft, target), (inputs.draft_weights.float().softmax(-1), expected))


def test_the_baseline_verifies_as_we_do() -> None:
    """Different random numbers, the same rates: the mean number accepted over 4,000 rows."""
    inputs = cases.verification_inputs((4000, 2, 20), torch.float32, "cpu", 0)
    theirs, token_ids = cases.pytorch_verify(inputs)
    ours, _, failed = verify_logits(*inputs, variant="rejection")
    assert not failed.any() and token_ids.min() >= 0 and token_ids.max() < 20
    assert abs(theirs.double().mean() - ours.double().mean()) < 0.06  # three standard errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(FlashSpecError, match="this machine has no CUDA device"):
        kernels.run()


def rehearse_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run but the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device, timer: 1e9)


def test_a_run_from_grid_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse_on_a_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    output = tmp_path / "kernels.json"
    chosen = ["verify_logits", "verify_tokens"]
    result = kernels.run(output, chosen, grid=GRID, replays=1, calls=2, device="cpu")
    assert [row["kernel"] for row in result["rows"]] == chosen
    assert kind_of(json.loads(output.read_text())) == "kernels"
    assert output.with_suffix(".csv").exists() and output.with_suffix(".png").exists()


def test_an_unknown_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse_on_a_cpu(monkeypatch)
    with pytest.raises(FlashSpecError, match="kernel 'flash' is unknown; there are verify_logits"):
        kernels.run(kernels=["flash"])
