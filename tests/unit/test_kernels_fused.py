"""Fused verification: the kernel against its twin (interpreted on a CPU, for real on a GPU), the twin against the
sampler that it stands in for."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashspec.config import SamplingConfig
from flashspec.core import Draft
from flashspec.kernels import TRITON_AVAILABLE, reference_fused, verify_logits
from flashspec.sampling.noise import Purpose
from flashspec.sampling.sampler import make_sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ["rejection", "coupled", "typical", "greedy"]

if TRITON_AVAILABLE:
    from flashspec.kernels import fused

needs_triton = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads the variable again at its first launch."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def problem(
    batch_size: int,
    gamma: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    one_hot: bool = False,
    cut: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Ragged drafts close to the target, tokens drawn from them, so that lengths of every kind are accepted."""
    generator = torch.Generator().manual_seed(seed + vocab_size + gamma)
    target = 2.5 * torch.randn(batch_size, gamma + 1, vocab_size, generator=generator)
    weights = target[:, :gamma] + 0.5 * torch.randn(batch_size, gamma, vocab_size, generator=generator)
    probs = weights.softmax(-1).view(-1, vocab_size)
    token_ids = torch.zeros(batch_size, gamma, dtype=torch.int64)
    if token_ids.numel():
        token_ids = torch.multinomial(probs, 1, generator=generator).view(batch_size, gamma)
    if one_hot:
        token_ids = torch.where(
            torch.rand(token_ids.shape, generator=generator) < 0.7, target[:, :-1].argmax(-1), token_ids
        )
    lengths = torch.randint(0, gamma + 1, (batch_size,), generator=generator)
    lengths[::2] = gamma
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.3]).repeat(batch_size)[:batch_size]
    floors = torch.where(torch.rand(batch_size, gamma + 1, generator=generator) < 0.5, 1.0, -math.inf)
    arguments = {
        "target_logits": target.to(dtype),
        "draft_token_ids": token_ids,
        "draft_lengths": lengths,
        "draft_weights": None if one_hot else weights.to(dtype),
        "seeds": torch.randint(2**62, (batch_size,), generator=generator),
        "lengths": torch.randint(2**33, (batch_size,), generator=generator),
        "temperature": temperature,
        "floors": floors if cut else None,
    }
    return {name: value if value is None else value.to(DEVICE) for name, value in arguments.items()}


def assert_equals_twin(arguments: dict[str, Any], variant: str) -> tuple[Tensor, Tensor, Tensor]:
    thresholds = {"epsilon": 0.09, "delta": 0.3}
    found = fused.verify_logits(**arguments, variant=variant, **thresholds)
    num_accepted, next_token, failed = reference_fused.verify_logits(**arguments, variant=variant, **thresholds)
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.int64, torch.bool]
    assert torch.equal(found[2], failed)
    assert torch.equal(found[0], num_accepted)
    assert torch.equal(found[1][~failed], next_token[~failed])
    assert ((found[1] >= 0) & (found[1] < arguments["target_logits"].shape[2])).all()
    return found


@needs_triton
@pytest.mark.parametrize(
    ("variant", "one_hot", "cut"),
    [
        ("rejection", False, False),
        ("rejection", False, True),
        ("rejection", True, False),
        ("coupled", True, True),
        ("typical", True, False),
        ("typical", True, True),
        ("greedy", True, False),
    ],
)
@pytest.mark.parametrize(
    ("batch_size", "gamma", "vocab_size", "dtype"),
    [
        (4, 1, 100, torch.float32),
        (2, 4, 100, torch.bfloat16),
        (1, 16, 100, torch.float16),
        (2, 1, 1025, torch.float32),
        (1, 1, 8193, torch.float32),
        (1, 1, 10_000, torch.bfloat16),
        (2, 0, 100, torch.float32),
        (0, 3, 100, torch.float32),
    ],
)
def test_kernel_equals_its_twin(
    batch_size: int, gamma: int, vocab_size: int, dtype: torch.dtype, one_hot: bool, cut: bool, variant: str
) -> None:
    assert_equals_twin(problem(batch_size, gamma, vocab_size, dtype, one_hot, cut), variant)


@needs_triton
@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 151_936])
def test_kernel_equals_its_twin_on_real_vocabularies(vocab_size: int) -> None:
    for variant in VARIANTS if DEVICE == "cuda" else ["greedy"]:  # interpreted, a draw takes 10 s here
        assert_equals_twin(problem(1, 1, vocab_size), variant)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_fail_only_where_they_are_used(value: float, variant: str) -> None:
    arguments = problem(6, 2, 1100)
    logits = arguments["target_logits"]
    if value == -math.inf:
        logits[:, 1] = value
        logits[:, :, 1024:] = value  # a whole tile without mass is nothing unusual
    else:
        logits[:, 1, 1050] = value
    num_accepted, _, failed = assert_equals_twin(arguments, variant)
    assert failed.any() and not failed.all()
    assert torch.equal(failed, num_accepted >= 1)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_draft_that_is_not_finite_is_rejected_and_the_target_draws() -> None:
    arguments = problem(3, 2, 300)
    arguments["temperature"].fill_(1.0)
    arguments["draft_lengths"].fill_(2)
    arguments["draft_weights"][:, 0, 5] = math.nan
    num_accepted, next_token, failed = assert_equals_twin(arguments, "rejection")
    assert not num_accepted.any() and not failed.any()
    empty = arguments | {"draft_lengths": torch.zeros_like(num_accepted)}
    assert torch.equal(assert_equals_twin(empty, "rejection")[1], next_token)


@needs_triton
def test_an_empty_residual_falls_back_to_the_target() -> None:
    """A certain target against a draft as certain: only the wrong token is rejected, and p - q is never positive."""
    logits = torch.full((1, 2, 40), -math.inf, device=DEVICE)
    logits[..., 9] = 0.0
    arguments = problem(1, 1, 40) | {"target_logits": logits, "draft_weights": logits[:, :1].clone()}
    arguments["draft_token_ids"].fill_(3)
    arguments["draft_lengths"].fill_(1)
    num_accepted, next_token, failed = assert_equals_twin(arguments, "rejection")
    assert (num_accepted.item(), next_token.item(), failed.item()) == (0, 9, False)


@needs_triton
@pytest.mark.parametrize("outside", [-1, 100, 2**40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_outside_the_vocabulary_is_rejected_unread(outside: int, variant: str) -> None:
    arguments = problem(4, 2, 100, one_hot=True)
    arguments["draft_token_ids"][:, 0] = outside
    found = fused.verify_logits(**arguments, variant=variant)
    assert not found[0].any() and not found[2].any()


@needs_triton
def test_any_strides_give_the_same() -> None:
    arguments = problem(3, 2, 200)
    logits, weights = arguments["target_logits"], arguments["draft_weights"]
    wide = torch.zeros(3, 6, 300, device=DEVICE)
    wide[:, 1:4, 40:240] = logits
    strided = {
        "target_logits": wide[:, 1:4, 40:240],
        "draft_weights": weights.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    expected = fused.verify_logits(**arguments, variant="rejection")
    for found, wanted in zip(fused.verify_logits(**(arguments | strided), variant="rejection"), expected, strict=True):
        assert torch.equal(found, wanted)


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pieces_are_the_vocabulary(variant: str) -> None:
    size = 1024 if variant == "coupled" else 4096
    for batch_size, gamma, vocab_size in itertools.product(
        (1, 4, 32, 512), (1, 4, 16), (1000, 32_000, 49_152, 151_936)
    ):
        cut = fused.plan(batch_size, 2 * gamma + 1, vocab_size, variant, 132)
        assert (cut.n_tiles - 1) * cut.steps * size < vocab_size <= cut.n_tiles * cut.steps * size
        assert cut.steps <= 8 and cut.draw_steps <= 8
        if variant in ("rejection", "typical"):
            assert (cut.n_draws - 1) * cut.draw_steps * 1024 < vocab_size <= cut.n_draws * cut.draw_steps * 1024


@needs_triton
def test_the_draws_of_few_rows_have_room() -> None:
    for batch_size, gamma, vocab_size in itertools.product((1, 4), (1, 4, 16), (32_000, 128_256, 151_936)):
        cut = fused.plan(batch_size, 2 * gamma + 1, vocab_size, "rejection", 132)
        assert batch_size * cut.n_draws <= 132
        assert batch_size * (2 * gamma + 1) * cut.n_tiles <= 2.5 * 132 or cut.steps == 8
    one, many = (fused.plan(*size, "rejection", 132) for size in ((1, 9, 128_256), (32, 17, 151_936)))
    assert (one.steps, one.n_draws) == (1, 126) and many.steps > 1 and many.draw_steps > 1
    assert fused.pieces(49_152, 4096, 8) == (6, 2)  # not 8 and 4
    assert fused.pieces(1000, 4096, 8) == (1, 1)


CUTS = {
    "rejection": (2, 2, 3, 4, 4),
    "typical": (2, 2, 3, 4, 8),
    "coupled": (2, 5, 1, 1, 8),
    "greedy": (2, 2, 1, 1, 8),
}


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_long_pieces_decide_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "plan", lambda *arguments: fused.Plan(*CUTS[variant]))
    assert_equals_twin(problem(1, 1, 10_001), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_twin_is_the_sampler(
    temperature: float, one_hot: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variant == "greedy" and temperature:
        pytest.skip("sampled rows are never verified greedily")
    arguments = problem(30, 4, 120, one_hot=one_hot)
    arguments["temperature"].fill_(temperature)
    arguments["target_logits"][3:6, 2] = math.nan
    config = SamplingConfig(temperature=temperature, variant="rejection" if variant == "greedy" else variant)
    sampler = make_sampler(config, [[1]] * 30, [], 120, seed=5, device=torch.device(DEVICE))
    arguments["seeds"] = sampler.seeds
    draft = Draft(arguments["draft_token_ids"], arguments["draft_lengths"], arguments["draft_weights"])
    verdict, failed = sampler.verify(arguments["target_logits"], draft, arguments["lengths"])
    found = reference_fused.verify_logits(**arguments, variant=variant, epsilon=0.09, delta=0.3)
    assert torch.equal(found[2], failed)
    assert torch.equal(found[0][~failed], verdict.num_accepted[~failed])
    assert torch.equal(found[1][~failed], verdict.next_token[~failed])


def test_the_purposes_are_the_samplers() -> None:
    purposes = reference_fused.ACCEPT, reference_fused.RECOVER, reference_fused.TOKEN
    assert purposes == (Purpose.ACCEPT, Purpose.RECOVER, Purpose.TOKEN)


@needs_triton
def test_the_draws_follow_the_target() -> None:
    """One position drafted from q, verified against p, 6,000 rows: the first token out follows p."""
    rows, vocab_size = 6000, 6
    target = torch.tensor([0.35, 0.05, 0.2, 0.1, 0.25, 0.05]).log()
    draft = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1, 0.1]).log()
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(draft.exp(), rows, replacement=True, generator=generator)[:, None]
    arguments = {
        "target_logits": target.expand(rows, 2, vocab_size),
        "draft_token_ids": drawn,
        "draft_lengths": torch.ones(rows, dtype=torch.int64),
        "draft_weights": draft.expand(rows, 1, vocab_size),
        "seeds": torch.arange(rows),
        "lengths": torch.full((rows,), 11),
        "temperature": torch.ones(rows),
    }
    arguments = {name: value.to(DEVICE) for name, value in arguments.items()}
    run = fused.verify_logits if DEVICE == "cuda" else reference_fused.verify_logits
    num_accepted, next_token, _ = run(**arguments, variant="rejection")
    first = torch.where(num_accepted == 1, arguments["draft_token_ids"][:, 0], next_token)
    counts = torch.bincount(first, minlength=vocab_size).double().cpu()
    expected = target.double().exp() * rows
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7  # chi-square, 5 degrees of freedom, p = 1e-4


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_graph_replays_on_new_inputs() -> None:
    first, second = problem(6, 4, 10_000, seed=1), problem(6, 4, 10_000, seed=2)
    fused.verify_logits(**first, variant="rejection")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused.verify_logits(**first, variant="rejection")
    for _ in range(3):
        for arguments in (second, problem(6, 4, 10_000, seed=1)):
            for name, value in arguments.items():
                if value is not None:
                    first[name].copy_(value)
            graph.replay()
            for got, wanted in zip(found, reference_fused.verify_logits(**arguments, variant="rejection"), strict=True):
                assert torch.equal(got, wanted)


def test_nothing_is_read_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():
        ids, rows = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        logits, weights = torch.zeros(2, 4, 9), torch.zeros(2, 3, 9)
        for variant in VARIANTS:
            found = verify_logits(logits, ids, rows, weights, rows, rows, torch.ones(2), variant)
            assert [tensor.shape for tensor in found] == [(2,)] * 3


@needs_triton
def test_the_door_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashspec import kernels

    monkeypatch.setattr(kernels, "reference_fused", None)
    found = kernels.verify_logits(**problem(2, 2, 50), variant="rejection")
    assert found[0].shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_logits": torch.zeros(2, 5)}, r"target_logits should be \(B, γ \+ 1, V\)"),
        ({"target_logits": torch.zeros(2, 3, 9).double()}, "target_logits should be torch.float32 or"),
        ({"draft_token_ids": torch.zeros(2, 3).long()}, r"draft_token_ids should have shape \(2, 2\)"),
        ({"draft_weights": torch.zeros(2, 2, 8)}, r"draft_weights should have shape \(2, 2, 9\)"),
        ({"draft_lengths": torch.zeros(2)}, "draft_lengths should be torch.int64"),
        ({"seeds": torch.zeros(3).long()}, r"seeds should have shape \(2,\)"),
        ({"temperature": torch.zeros(2).double()}, "temperature should be torch.float32"),
        ({"variant": "exact"}, "variant should be one of rejection, coupled, typical, greedy: got 'exact'"),
        ({"floors": torch.zeros(2, 2)}, r"floors should have shape \(2, 3\)"),
    ],
)
def test_the_door_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    arguments = {
        "target_logits": torch.zeros(2, 3, 9),
        "draft_token_ids": torch.zeros(2, 2, dtype=torch.int64),
        "draft_lengths": rows,
        "draft_weights": None,
        "seeds": rows,
        "lengths": rows,
        "temperature": torch.ones(2),
        "variant": "rejection",
    }
    with pytest.raises(ValueError, match=message):
        verify_logits(**(arguments | change))
