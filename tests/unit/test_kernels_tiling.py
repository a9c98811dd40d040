"""How weights are cut: measured once, remembered on disk, guessed where nothing was measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashspec.kernels import tiling


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(tiling, "_chosen", {})
    monkeypatch.setattr(tiling, "_passing", set())


def weight(outputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(outputs, 128, dtype=dtype)


def never(*_: object) -> float:
    raise AssertionError("nothing should be measured")


def cuts(*products: tuple[torch.Tensor, bool]) -> list[tiling.Tiling]:
    return [tiling.tiling_of(*product) for product in products]


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured returns its own milliseconds, of which the first replays take more."""
    replays = itertools.count(1)
    monkeypatch.setattr(tiling, "captured", lambda run: run())
    monkeypatch.setattr(tiling, "_milliseconds", lambda milliseconds: milliseconds * (1 + 10 / next(replays)))


A, B = (weight(), False), (weight(80), True)


@pytest.mark.usefixtures("clockwork")
@pytest.mark.parametrize("best", tiling.CANDIDATES, ids=str)
def test_the_fastest_cut_is_kept_and_found_again(best: tiling.Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling.choose([A], lambda: 1.0 if cuts(A) == [best] else 1.1)
    assert cuts(A) == [best]
    tiling.choose([A], never)  # known in this process
    monkeypatch.setattr(tiling, "_chosen", {})
    tiling.choose([A], never)  # known on disk
    assert cuts(A) == [best]


@pytest.mark.usefixtures("clockwork")
def test_cuts_are_measured_among_each_others() -> None:
    first, second = tiling.CANDIDATES[2], tiling.CANDIDATES[4]

    def run() -> float:
        a, b = cuts(A, B)
        return 1.0 + (b != second) + 0.1 * (a != (first if b == second else tiling.CANDIDATES[0]))

    tiling.choose([A, B], run)
    assert cuts(A, B) == [first, second]


@pytest.mark.usefixtures("clockwork")
def test_two_cuts_that_only_pay_together_are_found_where_they_are_the_likeliest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    likeliest = tiling.CANDIDATES[0]
    monkeypatch.setattr(tiling, "_candidates", lambda *product: (likeliest, tiling.guess(*product)))
    tiling.choose([A, B], lambda: (2.0, 3.0, 1.0)[cuts(A, B).count(likeliest)])
    assert cuts(A, B) == [likeliest, likeliest]


@pytest.mark.parametrize("small", [False, True])
def test_the_likeliest_is_the_first_candidate(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = pytest.importorskip("flashspec.kernels.direct")
    monkeypatch.setattr(direct, "takes", lambda weight: small)
    product = SimpleNamespace(shape=(4096, 14336), dtype=torch.bfloat16, device=torch.device("cuda", 0)), False
    found = tiling._candidates(*product)
    assert found[:2] == (tiling.DIRECT, tiling.guess(*product)) if small else found[0] == tiling.guess(*product)
    assert len(found) == 2 if small else set(found) == set(tiling.CANDIDATES)


@pytest.mark.usefixtures("clockwork")
def test_what_is_not_kept_decides_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, among = tiling.CANDIDATES[2], tiling.CANDIDATES[4]
    for _ in range(2):  # the second finds what is kept, and measures all the same
        tiling.choose([A], lambda: 1.0 if cuts(A) == [alone] else 2.0, keep=False)
        assert cuts(A) == [alone]
        tiling.choose([A], lambda: 1.0 if cuts(A) == [among] else 2.0)
        assert cuts(A) == [among]
    tiling.choose([A], lambda: 1.0 if cuts(A) == [alone] else 2.0, keep=False)
    tiling.choose([B], lambda: 1.0)  # writes what is kept
    monkeypatch.setattr(tiling, "_chosen", {})
    monkeypatch.setattr(tiling, "_passing", set())
    tiling.choose([A], never)
    assert cuts(A) == [among]


@pytest.mark.usefixtures("clockwork")
def test_every_cut_is_compiled_in_a_thread_of_its_own_before_any_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once: each waits for the others, and sees its own cut alone."""
    compiled, all_here = list[tuple[tiling.Tiling, ...]](), threading.Barrier(2 * len(tiling.CANDIDATES) - 1)
    modes, measured = set[bool](), list[Callable[[], float]]()

    def captured(run: Callable[[], float]) -> float:
        measured.append(run)
        return run()

    monkeypatch.setattr(tiling, "captured", captured)
    monkeypatch.setattr(tiling, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(all_here.parties))

    def run() -> float:
        if threading.current_thread() is not threading.main_thread():
            all_here.wait(20)
            assert not measured
            compiled.append(tuple(cuts(A, B)))
            modes.add(torch.is_inference_mode_enabled())
        return 1.0

    first = tiling._candidates(*A)[0], tiling._candidates(*B)[0]
    with torch.inference_mode():
        tiling.choose([A, B], run, later=[run])
    others = [tiling._candidates(*product)[1:] for product in (A, B)]
    assert set(compiled) == {first, *((cut, first[1]) for cut in others[0]), *((first[0], cut) for cut in others[1])}
    assert modes == {True}


@pytest.mark.usefixtures("clockwork")
def test_what_chooses_inside_does_so_when_it_first_runs_and_never_in_a_thread() -> None:
    """A thread would wait for ever for the one that waits for it."""
    again = list[bool]()

    def run() -> float:
        if threading.current_thread() is threading.main_thread() and not again:
            again.append(True)
            tiling.choose([B], lambda: 1.0)
        assert again  # before any thread runs
        return 1.0

    tiling.choose([A], run)
    assert again and len(tiling._chosen) == 2

    def always() -> float:
        tiling.choose([(weight(96), False)], lambda: 1.0)
        return 1.0

    with pytest.raises(RuntimeError, match="a thread that compiles cannot choose"):
        tiling.choose([(weight(112), False)], always)


@pytest.mark.usefixtures("clockwork")
def test_what_is_compiled_for_later_may_fail() -> None:
    tiling.choose([A], lambda: 1.0, later=[never])
    assert cuts(A)[0] in tiling.CANDIDATES


@pytest.mark.usefixtures("clockwork")
def test_where_a_compilation_fails_the_rest_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MOST_THREADS", 1)
    compiled = list[float]()

    def run() -> float:
        if threading.current_thread() is not threading.main_thread():
            compiled.append(1.0)
            if len(compiled) == 1:
                raise torch.OutOfMemoryError
            time.sleep(0.2)
        return 1.0

    with pytest.raises(torch.OutOfMemoryError):
        tiling.choose([A, B], run)
    assert len(compiled) < len(tiling._candidates(*A)) and not tiling._chosen


@pytest.mark.usefixtures("clockwork")
def test_what_failed_half_way_is_measured_anew() -> None:
    def run() -> float:
        if cuts(B) == [tiling.CANDIDATES[4]]:
            raise torch.OutOfMemoryError
        return 1.0

    with pytest.raises(torch.OutOfMemoryError):
        tiling.choose([A, B], run)
    assert not tiling._chosen and not tiling._stored()
    tiling.choose([A, B], lambda: 1.0 if cuts(B) == [tiling.CANDIDATES[5]] else 2.0)
    assert cuts(B) == [tiling.CANDIDATES[5]]


@pytest.mark.usefixtures("clockwork")
def test_nobody_sees_a_cut_that_is_being_tried() -> None:
    seen: list[tiling.Tiling] = []

    def another_engine() -> None:
        tiling.choose([A], never)
        seen.extend(cuts(A))

    thread = threading.Thread(target=another_engine)

    def run() -> float:
        if cuts(A) == [tiling.CANDIDATES[2]] and not thread.ident:
            thread.start()
            thread.join(0.05)
        return 1.0 if cuts(A) == [tiling.CANDIDATES[5]] else 2.0

    tiling.choose([A], run)
    thread.join()
    assert seen == [tiling.CANDIDATES[5]]


@pytest.mark.usefixtures("clockwork")
def test_a_shape_stands_for_itself() -> None:
    tiling.choose([A], lambda: 1.0 if cuts(A) == [tiling.CANDIDATES[4]] else 2.0)
    others = [(weight(80), False), (weight(), True), (weight(dtype=torch.int8), False)]
    assert cuts(*others) == [tiling.guess(*other) for other in others]


@pytest.mark.parametrize("gated", [False, True])
def test_more_tokens_than_the_direct_kernel_takes_have_another_cut(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiling._chosen, tiling._name(A[0], gated), tiling.DIRECT)
    assert [tiling.tiling_of(A[0], gated, tokens) for tokens in (1, 16)] == [tiling.DIRECT] * 2
    assert tiling.tiling_of(A[0], gated, 17) == tiling.guess(A[0], gated)


@pytest.mark.usefixtures("clockwork")
def test_bytes_have_cuts_of_their_own() -> None:
    product = weight(dtype=torch.int8), False
    tiling.choose([product], lambda: 1.0 if cuts(product) == [tiling.OF_BYTES[2]] else 2.0)
    assert cuts(product) == [tiling.OF_BYTES[2]]


@pytest.mark.usefixtures("clockwork")
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}'])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / tiling.FILE).write_text(content)
    tiling.choose([A], lambda: float(cuts(A)[0].rows))
    assert cuts(A)[0].rows == min(cut.rows for cut in tiling.CANDIDATES)


def test_float32_is_never_measured() -> None:
    product = weight(dtype=torch.float32), False
    tiling.choose([product], never)
    assert cuts(product)[0].strands == 1


@pytest.mark.parametrize(
    ("outputs", "gated"), [(576, False), (2048, False), (4096, False), (128256, False), (28672, True)]
)
def test_a_guess_is_one_of_the_candidates(outputs: int, gated: bool) -> None:
    assert tiling.guess(torch.zeros(outputs, 16, dtype=torch.bfloat16), gated) in tiling.CANDIDATES
