"""The kernels of a step besides verification, against their twins: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashspec import kernels
from flashspec.core import Draft, FinishReason
from flashspec.kernels import TRITON_AVAILABLE, native_build, native_choose, native_step, reference_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")

if TRITON_AVAILABLE:
    from flashspec.kernels import append, choose, cut, lookup

needs_triton = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy, which announces log(0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads the variable again at its first launch."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def logits_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (2.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(DEVICE, dtype)


def on_device(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}


CUTS = {
    "top-k": {"top_k": torch.tensor([1, 5, 0, 50, 1000])},
    "top-p": {"top_p": torch.tensor([0.9, 0.1, 1.0, 0.5, 0.99])},
    "min-p": {"min_p": torch.tensor([0.1, 0.0, 1.0, 0.5, 0.01])},
    "all": {
        "top_k": torch.tensor([40, 0, 3, 1000, 40]),
        "top_p": torch.tensor([0.9, 0.8, 0.95, 0.5, 1.0]),
        "min_p": torch.tensor([0.001, 0.0, 0.1, 0.2, 0.0]),
    },
}


def assert_cuts_equal(logits: Tensor, temperature: Tensor, cuts: dict[str, Tensor]) -> None:
    """The same tokens stay; at the edge of a nucleus sums may round to one token more or less of it."""
    found = cut.cut_floors(logits, temperature, *(cuts.get(name) for name in ("top_k", "top_p", "min_p")))
    expected = reference_fused.cut_floors(logits, temperature, **cuts)
    assert found.dtype == torch.float32 and found.shape == logits.shape[:2]
    kept, wanted = logits.float() >= found[..., None], logits.float() >= expected[..., None]
    differing = (kept != wanted).sum(-1)
    allowed = (1 + wanted.sum(-1) // 1000) if "top_p" in cuts else torch.zeros_like(differing)
    assert (differing <= allowed).all()


@needs_triton
@quiet
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1000, torch.float32), (8193, torch.bfloat16), (10_000, torch.float32)]
)
def test_cuts_equal_their_twins(vocab_size: int, dtype: torch.dtype, cuts: dict[str, Tensor]) -> None:
    logits = logits_of(5, 1, vocab_size, dtype=dtype)
    temperature = torch.tensor([1.0, 0.7, 1.0, 1.3, 0.5], device=DEVICE)
    assert_cuts_equal(logits, temperature, on_device(**cuts))


@needs_triton
@quiet
def test_ties_at_a_cut_stay() -> None:
    logits = torch.tensor([[[3.0, 1.0, 1.0, 0.0], [0.0, math.log(0.51), math.log(0.49), -9.0]]], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert cut.cut_floors(logits, one, torch.tensor([2], device=DEVICE), None, None).tolist()[0][0] == 1.0
    assert cut.cut_floors(logits, one, None, one * 0.9, None)[0, 0] == 1.0
    assert cut.cut_floors(logits, one, None, None, one * 0.5)[0, 1].item() == pytest.approx(math.log(0.5))


@needs_triton
@quiet
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_cut_where_logits_are_not_finite(value: float) -> None:
    logits = logits_of(2, 1, 300)
    logits[0, 0, 7] = value
    arguments = on_device(temperature=torch.ones(2), top_k=torch.tensor([3, 3]), top_p=torch.tensor([0.9, 0.9]))
    for run in (cut.cut_floors, reference_fused.cut_floors):
        floors = run(logits, *arguments.values(), None)
        assert floors[0, 0] == -math.inf and floors[1, 0] > 0


@needs_triton
@quiet
def test_tokens_ruled_out_before_are_not_counted() -> None:
    logits = torch.full((1, 1, 5000), -math.inf, device=DEVICE)
    logits[0, 0, [3, 4500]] = torch.tensor([1.0, -2.0], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    assert cut.cut_floors(logits, one, torch.tensor([2], device=DEVICE), None, None).item() == -2.0
    assert cut.cut_floors(logits, one, torch.tensor([5], device=DEVICE), None, None).item() == -math.inf
    assert cut.cut_floors(logits, one, None, one * 0.9999, None).item() == -2.0


def choice(
    batch_size: int, vocab_size: int, dtype: torch.dtype = torch.float32, bias: bool = False, floors: bool = False
) -> dict[str, Any]:
    """Rows at four temperatures; the draft is at its third token, where some rows' drafts are over."""
    generator = torch.Generator().manual_seed(vocab_size)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.3]).repeat(batch_size)[:batch_size]
    return {"logits": logits_of(batch_size, vocab_size, dtype=dtype), "offset": 2, "purpose": 0} | on_device(
        seeds=torch.randint(2**62, (batch_size,), generator=generator),
        lengths=torch.randint(2**33, (batch_size,), generator=generator),
        temperature=temperature,
        part=3 * torch.randperm(vocab_size, generator=generator) if bias else None,
        bias=torch.randn(batch_size, vocab_size, generator=generator) if bias else None,
        floors=torch.linspace(-1, 4, batch_size) if floors else None,
    )


def begun_draft(batch_size: int, vocab_size: int, weights: bool) -> Draft:
    """A third of the rows ended at their second token."""
    over = torch.arange(batch_size, device=DEVICE) % 3 == 1
    size = (batch_size, 4, vocab_size)
    return Draft(
        torch.full(size[:2], -7, device=DEVICE),
        torch.where(over, 1, 2),
        torch.full(size, math.nan, device=DEVICE) if weights else None,
        over.clone(),
    )


def assert_choices_equal(choose_tokens: Callable[..., None], arguments: dict[str, Any], weights: bool = True) -> Draft:
    """The same in every column, but for tokens of logits that are not finite, which need only be some of the part's."""
    (batch_size, vocab_size), part = arguments["logits"].shape, arguments["part"]
    found, expected = (begun_draft(batch_size, vocab_size, weights) for _ in range(2))
    choose_tokens(draft=found, **arguments)
    reference_fused.choose_tokens(draft=expected, **arguments)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.faulty is not None and expected.faulty is not None and torch.equal(found.faulty, expected.faulty)
    biased = arguments["logits"].float() + (0 if arguments["bias"] is None else arguments["bias"])
    finite = biased.amax(-1).isfinite()
    assert torch.equal(found.token_ids[finite], expected.token_ids[finite])
    known = torch.arange(vocab_size, device=DEVICE) if part is None else part
    assert torch.isin(found.token_ids[:, arguments["offset"]], known).all()
    if found.logits is not None and expected.logits is not None:
        assert torch.equal(found.logits.nan_to_num(7.0), expected.logits.nan_to_num(7.0))
    return found


@pytest.fixture(params=["triton", "native"])
def choose_tokens(request: pytest.FixtureRequest) -> Callable[..., None]:
    if request.param == "triton":
        return choose.choose_tokens if TRITON_AVAILABLE else pytest.skip("Triton is not installed")
    if DEVICE == "cuda" or not native_build.available():
        pytest.skip(native_build.why_not() or "C++ is for CPUs")
    return native_choose.choose_tokens


@quiet
@pytest.mark.parametrize(("bias", "floors"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("batch_size", "vocab_size", "dtype"),
    [(6, 100, torch.float32), (2, 8193, torch.bfloat16), (0, 50, torch.float32), (1, 10_000, torch.float16)],
)
def test_choices_equal_their_twins(
    choose_tokens: Callable[..., None], batch_size: int, vocab_size: int, dtype: torch.dtype, bias: bool, floors: bool
) -> None:
    assert_choices_equal(choose_tokens, choice(batch_size, vocab_size, dtype, bias, floors))


@quiet
@pytest.mark.parametrize("purpose", [None, 3])
def test_choices_without_weights_equal_their_twins(choose_tokens: Callable[..., None], purpose: int | None) -> None:
    for vocab_size in (1, 2, 63, 64, 65, 1000):
        for seed in range(5):
            arguments = choice(4, vocab_size) | {"logits": logits_of(4, vocab_size, seed=seed), "purpose": purpose}
            if purpose is None:
                arguments["temperature"] = torch.zeros(4, device=DEVICE)
            assert_choices_equal(choose_tokens, arguments, weights=False)


@quiet
def test_the_first_of_the_best_is_chosen(choose_tokens: Callable[..., None]) -> None:
    """Few logits, so that many are the largest."""
    arguments = choice(5, 700) | {"temperature": torch.zeros(5, device=DEVICE)}
    arguments["logits"] = torch.randint(3, (5, 700), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    assert_choices_equal(choose_tokens, arguments)


@quiet
def test_a_draft_ends_before_logits_that_are_not_finite(choose_tokens: Callable[..., None]) -> None:
    arguments = choice(9, 2500)
    arguments["logits"][0, 2400] = math.nan
    arguments["logits"][2, 3] = math.inf
    arguments["logits"][3] = -math.inf
    arguments["logits"][4, 0] = math.nan
    arguments["logits"][5, :2000] = -math.inf
    draft = assert_choices_equal(choose_tokens, arguments)
    assert draft.lengths.tolist() == [2, 1, 2, 2, 1, 3, 3, 1, 3]
    assert draft.faulty is not None
    assert draft.faulty.tolist() == [True, True, True, True, True, False, False, True, False]


@quiet
def test_a_draft_begins_anew_where_the_text_is_long_enough(choose_tokens: Callable[..., None]) -> None:
    arguments = choice(6, 100) | {"offset": 0, "least": 2, "lengths": torch.tensor([1, 2, 9, 1, 2, 9], device=DEVICE)}
    arguments["logits"][3:, 70] = math.nan
    draft = assert_choices_equal(choose_tokens, arguments)
    assert draft.lengths.tolist() == [0, 1, 1, 0, 0, 0]
    assert draft.faulty is not None and draft.faulty.tolist() == [False, False, False, False, True, True]


def texts(batch_size: int, size: int, words: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of few words, so that matches of every length occur; garbage, which matches too, behind their lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (batch_size, size), generator=generator)
    lengths = torch.randint(1, size - 70, (batch_size,), generator=generator)
    return tokens.to(DEVICE), lengths.to(DEVICE)


def assert_lookups_equal(tokens: Tensor, lengths: Tensor, length: int, max_ngram: int, min_ngram: int) -> Tensor:
    found = lookup.look_up(tokens, lengths, 0, length, max_ngram, min_ngram)
    expected = reference_fused.look_up(tokens, lengths, int(lengths.max()), length, max_ngram, min_ngram)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0][found[1] > 0], expected[0][found[1] > 0])
    return found[1]


@needs_triton
@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(3, 1), (5, 2), (1, 1)])
@pytest.mark.parametrize("words", [3, 40, 4000])
def test_lookups_equal_their_twins(words: int, max_ngram: int, min_ngram: int) -> None:
    tokens, lengths = texts(6, 200, words)
    lengths[:2] = torch.tensor([1, 2])
    assert_lookups_equal(tokens, lengths, 5, max_ngram, min_ngram)


@needs_triton
def test_a_long_text_is_read_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "BLOCK", 128)
    tokens, lengths = texts(12, 1500, 12)
    found = assert_lookups_equal(tokens, lengths, 4, 3, 3)
    assert (found == 4).any() and (found == 0).any()


def commitment(batch_size: int, gamma: int, seed: int = 0, faulty: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch_size, *shape), generator=generator)

    draft_lengths = whole(gamma + 1)
    lengths = 1 + whole(40)
    return on_device(
        token_ids=whole(12, gamma),
        draft_lengths=draft_lengths,
        num_accepted=(torch.rand(batch_size, generator=generator) * (draft_lengths + 1)).long(),
        next_token=whole(12),
        failed=whole(4) == 0,
        faulty=whole(2) == 0 if faulty else None,
        tokens=whole(12, 60 + gamma),
        lengths=lengths,
        limits=lengths + 1 + whole(gamma + 3),
        finish=whole(5) * (whole(3) == 0),
        stop_ids=torch.tensor([3, 7, -1]).expand(batch_size, -1),
        cached=torch.randint(60, (3, batch_size), generator=generator),
    )


def assert_commits_equal(arguments: dict[str, Any], commit: Callable[..., Tensor]) -> Tensor:
    copies = [{name: None if t is None else t.clone() for name, t in arguments.items()} for _ in range(2)]
    found, expected = commit(**copies[0]), reference_fused.commit(**copies[1])
    assert torch.equal(found, expected)
    for name in ("tokens", "lengths", "finish", "cached"):
        assert torch.equal(copies[0][name], copies[1][name]), name
    return found


@pytest.fixture(params=["triton", "native"])
def commit(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    if request.param == "triton":
        return append.commit if TRITON_AVAILABLE else pytest.skip("Triton is not installed")
    if DEVICE == "cuda" or not native_build.available():
        pytest.skip(native_build.why_not() or "C++ is for CPUs")
    return native_step.commit


@pytest.mark.parametrize("gamma", [0, 1, 4, 7, 16])
@pytest.mark.parametrize("faulty", [True, False])
def test_commits_equal_their_twins(commit: Callable[..., Tensor], gamma: int, faulty: bool) -> None:
    packed = assert_commits_equal(commitment(40, gamma, gamma, faulty), commit)
    reasons = FinishReason.RUNNING, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR
    assert set(reasons) <= set(packed[:, 3].tolist()) and packed[:, 4].any() == faulty


def test_commits_without_stop_tokens_or_readers(commit: Callable[..., Tensor]) -> None:
    arguments = commitment(5, 3)
    arguments["stop_ids"], arguments["cached"] = arguments["stop_ids"][:, :0], arguments["cached"][:0]
    assert_commits_equal(arguments, commit)


@pytest.mark.parametrize("interpret", [True, False])
def test_the_doors_lead_there(interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpret and not TRITON_AVAILABLE:
        pytest.skip("Triton is not installed")
    if not interpret:
        if DEVICE == "cuda":
            pytest.skip("a GPU always runs the kernels")
        monkeypatch.delenv("TRITON_INTERPRET")
    one, tokens = torch.ones(1, device=DEVICE), torch.tensor([[1, 2, 3, 1, 2, 0, 0, 0]], device=DEVICE)
    logits = torch.tensor([[0.0, 9.0, 1.0]], device=DEVICE)
    seeds = torch.tensor([5], device=DEVICE)
    assert kernels.cut_floors(logits[None], one, seeds * 0 + 1).tolist() == [[9.0]]
    draft = begun_draft(1, 3, weights=False)
    kernels.choose_tokens(logits, draft, 2, seeds, seeds, one * 0, 0)
    assert draft.token_ids.tolist() == [[-7, -7, 1, -7]] and draft.lengths.tolist() == [3]
    assert kernels.look_up(tokens, seeds, 5, 2, 3, 1)[0].tolist() == [[3, 1]]
    packed = kernels.commit(**commitment(2, 2))
    assert packed.shape == (2, 8)


@pytest.mark.skipif(DEVICE == "cuda", reason="fake tensors stand on a CPU")
def test_no_twin_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with FakeTensorMode():
        rows, logits = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 9)
        floors = kernels.cut_floors(logits, torch.ones(2), rows, torch.ones(2), torch.ones(2), max_top_k=4)
        assert floors.shape == (2, 3)
        for offset in range(2):
            draft = Draft(torch.zeros(2, 4).long(), rows.clone(), logits.new_empty(2, 4, 9), rows > 0)
            kernels.choose_tokens(logits[:, 0], draft, offset, rows, rows, torch.ones(2), 0, floors=floors[:, 0])
        assert kernels.look_up(torch.zeros(2, 8, dtype=torch.int64), rows, 4, 3, 2, 1)[0].shape == (2, 3)


def interleaved() -> Draft:
    return replace(begun_draft(2, 5, True), token_ids=torch.zeros(4, 2, dtype=torch.int64).T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.cut_floors(torch.zeros(2, 3), torch.ones(2)), r"logits should be \(B, Q, V\)"),
        (lambda: kernels.cut_floors(torch.zeros(2, 1, 3), torch.ones(2), torch.ones(2)), "top_k should be torch.int64"),
        (lambda: kernels.look_up(torch.zeros(2, 3).long(), torch.ones(2).long(), 3, 1, 1, 2), "min_ngram <= max_ngram"),
        (
            lambda: kernels.look_up(torch.zeros(3).long(), torch.ones(1).long(), 3, 1, 1, 1),
            r"tokens should be \(B, T\)",
        ),
        (lambda: kernels.commit(**(commitment(2, 1) | {"finish": torch.zeros(2)})), "finish should be torch.int64"),
        (
            lambda: kernels.commit(**(commitment(2, 1) | {"lengths": torch.ones(4).long()[::2]})),
            "lengths is written in place",
        ),
        (lambda: kernels.choose_tokens(**choice(2, 5), draft=begun_draft(2, 6, True)), "draft.logits should have"),
        (lambda: kernels.choose_tokens(**choice(2, 5), draft=interleaved()), "draft.token_ids is written in place"),
        (
            lambda: kernels.choose_tokens(**choice(2, 5), draft=Draft.empty(2, CPU)),
            "draft of 0 tokens should have faulty",
        ),
        (
            lambda: kernels.choose_tokens(**choice(2, 5) | {"offset": 4}, draft=begun_draft(2, 5, False)),
            "a place for token 4",
        ),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="the arguments stand on a CPU")
def test_the_doors_name_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
