"""Everything of a step that is not a model, on a real GPU: kernels against twins where interpreting takes too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from verification import assert_equals_twin, drawn

from flashspec.config import SamplingConfig
from flashspec.core import Draft, Likelihoods
from flashspec.kernels import reference_fused as twins
from flashspec.sampling.sampler import make_sampler

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from flashspec import kernels

DEVICE = torch.device("cuda")


def problem(rows: int, gamma: int, vocab_size: int, dtype: torch.dtype, one_hot: bool, seed: int) -> dict[str, Any]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    target = 2.5 * torch.randn(rows, gamma + 1, vocab_size, device=DEVICE, generator=generator)
    draft = target[:, :gamma] + 0.5 * torch.randn(rows, gamma, vocab_size, device=DEVICE, generator=generator)
    race = draft.softmax(-1) / torch.empty_like(draft).exponential_(generator=generator)
    whole = torch.randint(2**40, (3, rows), device=DEVICE, generator=generator)
    return {
        "target_logits": target.to(dtype),
        "draft_token_ids": (target[:, :gamma] if one_hot else race).argmax(-1),
        "draft_lengths": whole[0] % (gamma + 1),
        "draft_weights": None if one_hot else draft.to(dtype),
        "seeds": whole[1],
        "lengths": whole[2],
        "temperature": torch.tensor([1.0, 0.7, 0.0, 1.3], device=DEVICE).repeat(rows)[:rows],
    }


CASES = [  # compiling takes most of the time
    (100, torch.float32, False),
    (8193, torch.float32, False),
    (8193, torch.bfloat16, True),
    (32_000, torch.float32, True),
    (128_256, torch.bfloat16, False),
    (151_936, torch.float32, False),
]


@pytest.mark.parametrize(("vocab_size", "dtype", "cut"), CASES, ids=str)
@pytest.mark.parametrize("variant", ["rejection", "coupled", "typical", "greedy"])
def test_verdicts_equal_their_twins(variant: str, vocab_size: int, dtype: torch.dtype, cut: bool) -> None:
    for seed, (rows, gamma) in enumerate([(1, 4), (12, 6), *[(7, 1)] * (vocab_size == 8193)]):
        for one_hot in [False, True] if variant == "rejection" else [True]:
            arguments = problem(rows, gamma, vocab_size, dtype, one_hot, seed)
            if cut:
                limits = torch.full((rows,), 20, device=DEVICE), torch.full((rows,), 0.95, device=DEVICE)
                arguments["floors"] = kernels.cut_floors(arguments["target_logits"], arguments["temperature"], *limits)
            arguments |= {"variant": variant, "epsilon": 0.09, "delta": 0.3}
            num_accepted, next_token, failed = kernels.verify_logits(**arguments)
            wanted = twins.verify_logits(**arguments)
            assert torch.equal(num_accepted, wanted[0]) and torch.equal(next_token, wanted[1]) and not failed.any()
            assert ((next_token >= 0) & (next_token < vocab_size)).all()


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("variant", ["rejection", "coupled", "typical", "greedy"])
def test_verdicts_of_drawn_problems_equal_their_twins(variant: str, case: int) -> None:
    """Shapes, dtypes, strides, vocabulary edges; log-probabilities too, of other logits in half of the cases."""
    assert_equals_twin(drawn(case, "cuda", 20_000_000, 600), variant)


def launches(work: Callable[[], object]) -> list[str]:
    """What the device runs for it."""
    work()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("variant", ["rejection", "coupled", "typical", "greedy"])
def test_a_verdict_takes_two_launches_and_cuts_one_more(variant: str, rows: int) -> None:
    """From raw logits to tokens and their log-probabilities."""
    arguments = problem(rows, 4, 32_000, torch.float32, False, 1)
    logits, heat = arguments["target_logits"], arguments["temperature"]
    limits = torch.full((rows,), 20, device=DEVICE), torch.full((rows,), 0.95, device=DEVICE)
    likelihoods = Likelihoods.of(logits)

    def verify(cut: bool, likelihoods: Likelihoods | None) -> None:
        floors = kernels.cut_floors(logits, heat, *limits) if cut else None
        kernels.verify_logits(**arguments, variant=variant, floors=floors, likelihoods=likelihoods)

    for cut in (False, True):
        for asked in (None, likelihoods):
            names = launches(lambda cut=cut, asked=asked: verify(cut, asked))
            assert len(names) == 2 + cut, names


@pytest.mark.parametrize("vocab_size", [100, 8193, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.3, 8.0])
def test_cuts_equal_their_twins(spread: float, dtype: torch.dtype, vocab_size: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(vocab_size)
    logits = (spread * torch.randn(4, 3, vocab_size, device=DEVICE, generator=generator)).to(dtype)
    temperature = torch.tensor([1.0, 0.7, 1.3, 0.5], device=DEVICE)
    top_k = torch.tensor([1, 50, 0, min(vocab_size, 5000)], device=DEVICE)
    top_p = torch.tensor([0.5, 0.9, 0.99, 1.0], device=DEVICE)
    min_p = torch.tensor([0.0, 0.01, 0.1, 0.001], device=DEVICE)
    for cuts in ((top_k, None, None), (None, top_p, None), (None, None, min_p), (top_k, top_p, min_p)):
        found = kernels.cut_floors(logits, temperature, *cuts)[..., None]
        wanted = twins.cut_floors(logits, temperature, *cuts)[..., None]
        kept, expected = (logits.float() >= found), (logits.float() >= wanted)
        size = expected.sum(-1)
        assert ((kept.sum(-1) - size).abs() <= (size // 200 + 1) * (cuts[1] is not None)).all()


def empty_draft(rows: int, gamma: int, vocab_size: int | None, device: str = DEVICE) -> Draft:
    lengths = torch.empty(rows, dtype=torch.int64, device=device)
    weights = None if vocab_size is None else torch.empty(rows, gamma, vocab_size, device=device)
    return Draft(lengths.new_empty(rows, gamma), lengths, weights, lengths.new_empty(rows, dtype=torch.bool))


@pytest.mark.parametrize("vocab_size", [100, 8193, 151_936])
@pytest.mark.parametrize("rows", [1, 13])
def test_choices_equal_their_twins(rows: int, vocab_size: int) -> None:
    for purpose, dtype in ((0, torch.float32), (3, torch.bfloat16)):
        arguments = problem(rows, 1, vocab_size, dtype, True, 5)
        logits = arguments["target_logits"][:, 0]
        common = arguments["seeds"], arguments["lengths"], arguments["temperature"], purpose
        part = 2 * torch.randperm(vocab_size, device=DEVICE)
        found, wanted = empty_draft(rows, 3, vocab_size), empty_draft(rows, 3, vocab_size)
        for offset in range(3):
            if offset == 2:
                logits[0, vocab_size // 2] = float("nan")
            kernels.choose_tokens(logits, found, offset, *common, part=part)
            twins.choose_tokens(logits, wanted, offset, *common, part=part)
        assert torch.equal(found.token_ids[1:], wanted.token_ids[1:])
        assert torch.equal(found.token_ids[0, :2], wanted.token_ids[0, :2])
        assert found.lengths.tolist() == wanted.lengths.tolist() == [2] + [3] * (rows - 1)
        assert found.faulty is not None and found.faulty.tolist() == [True] + [False] * (rows - 1)
        assert found.logits is not None and wanted.logits is not None
        assert torch.equal(found.logits.nan_to_num(7.0), wanted.logits.nan_to_num(7.0))


@pytest.mark.parametrize("size", [300, 9000, 131_072])
def test_lookups_equal_their_twins(size: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(size)
    for words in (3, 60, 5000):
        tokens = torch.randint(words, (9, size), device=DEVICE, generator=generator)
        lengths = torch.randint(1, size - 64, (9,), device=DEVICE, generator=generator)
        found = kernels.look_up(tokens, lengths, size, 6, 3, 2)
        wanted = twins.look_up(tokens, lengths, size, 6, 3, 2)
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0][found[1] > 0], wanted[0][found[1] > 0])


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"variant": "coupled"},
    {"variant": "typical"},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"frequency_penalty": 0.5, "logit_bias": {3: 2.0}, "top_k": 50},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_captured_step_decides_as_the_cpu_does(settings: dict[str, Any]) -> None:
    """Draft, verify and commit in one graph, replayed on other texts, without a synchronisation."""
    vocab_size, rows, gamma = 3000, 5, 3
    samplers = [
        make_sampler(SamplingConfig(**settings), [[1]] * rows, [], vocab_size, 7, torch.device(device))
        for device in ("cuda", "cpu")
    ]
    inputs = problem(rows, gamma, vocab_size, torch.float32, True, 3)
    logits, lengths = inputs["target_logits"], inputs["lengths"]

    def run(which: int, logits: Tensor, lengths: Tensor) -> list[Tensor]:
        sampler = samplers[which]
        draft = empty_draft(rows, gamma, None if sampler.one_hot_drafts else vocab_size, logits.device.type)
        for offset in range(gamma):
            sampler.draw(logits[:, offset] + 0.3, draft, offset, lengths, vocab_size)
        verdict, failed = sampler.verify(logits, draft, lengths)
        return [draft.token_ids, draft.lengths, *verdict, failed]

    run(0, logits, lengths)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(0, logits, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(0, logits, lengths)
    for seed in (3, 4, 5):
        fresh = problem(rows, gamma, vocab_size, torch.float32, True, seed)
        logits.copy_(fresh["target_logits"])
        lengths.copy_(fresh["lengths"])
        graph.replay()
        wanted = run(1, logits.cpu(), lengths.cpu())
        for got, expected in zip(found, wanted, strict=True):
            assert torch.equal(got.cpu(), expected)
