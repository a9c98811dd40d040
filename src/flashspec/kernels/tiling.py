"""How a weight matrix is cut for the few-token product: measured once a shape and GPU, kept on disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from flashspec.cache import cache_dir
from flashspec.kernels.capture import captured
from flashspec.kernels.decoding import SAME_BITS

Work = Callable[[], object]


class Tiling(NamedTuple):
    """Rows a program, strands of the depth walked side by side, depth of a tile, warps, tiles under way.

    64 lines (rows times strands) fill the widest matrix instruction; more strands make more, smaller programs."""

    rows: int
    strands: int
    depth: int
    warps: int
    stages: int

    def programs(self, outputs: int) -> int:
        return -(-outputs // self.rows)


# Of 26 cuts measured on an H200 for 19 shapes of 135M to 70B models, one of these was within 3 % of the best.
CANDIDATES = (
    Tiling(64, 1, 128, 4, 5),
    Tiling(64, 1, 64, 4, 5),
    Tiling(32, 2, 128, 4, 5),
    Tiling(32, 2, 64, 4, 8),
    Tiling(16, 4, 128, 4, 5),
    Tiling(16, 4, 64, 4, 6),
)
OF_BYTES = (  # of 8 for the five products of an 8B head: within 1.5 %
    Tiling(64, 1, 256, 4, 4),
    Tiling(32, 2, 256, 4, 4),
    Tiling(32, 2, 128, 4, 6),
    Tiling(16, 4, 128, 4, 6),
)
DIRECT = Tiling(16, 8, 32, 8, 0)  # of the kernel in `direct`, for SAME_BITS tokens: its strands are its warps'
MEASURED = 1, 5, 9  # tokens; a cut may suit five and not nine
FILE = "cuts-4.json"  # in the cache; another number where the kernels or the way of measuring have changed
IN_NO_CACHE = 128 << 20  # bytes that do not fit in any L2
_chosen: dict[str, Tiling] = {}
_passing: set[str] = set()  # of these, measured by a benchmark and for no other use
_choosing = threading.RLock()  # a cut that is being tried is no other chooser's
_tried: ContextVar[tuple[str, Tiling] | None] = ContextVar("_tried", default=None)  # this thread's, before `_chosen`
_compiling = ContextVar("_compiling", default=False)  # in this thread, while another holds `_choosing`
MOST_THREADS = 16  # of compilation, each with a process of ptxas now and then


def tiling_of(weight: Tensor, gated: bool = False, tokens: int = 1) -> Tiling:
    """What `choose` measured for this shape, where it is for so many tokens, else a good guess."""
    name, tried = _name(weight, gated), _tried.get()
    found = tried[1] if tried and tried[0] == name else _chosen.get(name)
    return found if found and (found != DIRECT or tokens <= SAME_BITS) else guess(weight, gated)


def guess(weight: Tensor, gated: bool = False) -> Tiling:
    outputs = weight.shape[0] // (2 if gated else 1)
    if weight.dtype == torch.float32:
        return Tiling(16, 1, 64, 4, 4)
    if weight.dtype == torch.int8:
        return OF_BYTES[0] if outputs >= 6144 else OF_BYTES[3]
    # For 17 to 64 tokens, within 13 % of the best for 13 shapes on an H200.
    if outputs >= 5120 or (gated and outputs >= 4096):
        return CANDIDATES[0]
    if gated or weight.shape[1] < 1024:
        return CANDIDATES[1]
    return CANDIDATES[2] if outputs > 2048 else CANDIDATES[4]


def choose(products: Sequence[tuple[Tensor, bool]], run: Work, keep: bool = True, later: Sequence[Work] = ()) -> None:
    """Remember with which cuts of products, each a weight and whether it is gated, `run` is fastest. It multiplies by
    weights of their shapes among what surrounds them in use: how long neighbours wait depends on the cut too, by up to
    16 % of an 8B step. Each is measured twice, as the best cut depends on the others', which at first are the
    likeliest. keep: for every later use, else measured anew and for this process until it is chosen otherwise. later:
    what else will run, compiled meanwhile if it can be. RuntimeError: `run` still chooses when it runs again."""
    if _compiling.get():
        raise RuntimeError("a thread that compiles cannot choose: it would wait for the one that waits for it")
    with _choosing:
        if not _chosen:
            _chosen.update(_stored())
        named = {_name(*product): product for product in products if product[0].dtype != torch.float32}
        unknown = [(name, _candidates(*product)) for name, product in named.items() if not _known(name, keep)]
        try:
            _chosen.update((name, cuts[0]) for name, cuts in unknown)
            if unknown:
                run()  # what is chosen inside it is chosen now, and what surrounds the products is compiled once
                tries = [(name, cut) for name, (_, *others) in unknown for cut in others]
                _compile(tries, run, later, products[0][0].device)
            for name, cuts in unknown * 2:
                _chosen[name] = _fastest(name, cuts, run)
        except BaseException:
            for name, _ in unknown:
                _chosen.pop(name, None)
            raise
        names = {name for name, _ in unknown}
        (_passing.difference_update if keep else _passing.update)(names)
        if keep and unknown:
            _store()


def _known(name: str, keep: bool) -> bool:
    return keep and name in _chosen and name not in _passing


def _candidates(weight: Tensor, gated: bool) -> tuple[Tiling, ...]:
    """The likeliest first. Where the direct kernel may be it, one of the others beside it: each costs a second to
    compile."""
    likeliest = guess(weight, gated)
    if weight.device.type == "cuda":
        from flashspec.kernels import direct  # needs Triton

        if direct.takes(weight):
            return DIRECT, likeliest
    others = OF_BYTES if weight.dtype == torch.int8 else CANDIDATES
    return likeliest, *(cut for cut in others if cut != likeliest)


def _compile(tries: Sequence[tuple[str, Tiling]], run: Work, later: Sequence[Work], device: torch.device) -> None:
    """What `run` needs with each of these cuts of a product, and works that may fail. Many at a time, since most of a
    compilation is not Python's."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    inference = torch.is_inference_mode_enabled()

    def compile_one(cut: tuple[str, Tiling] | None, work: Work) -> None:
        _tried.set(cut)
        _compiling.set(True)
        with torch.inference_mode(inference), torch.cuda.stream(stream):
            work()

    pool = ThreadPoolExecutor(min(MOST_THREADS, 4 + (os.cpu_count() or 1)))
    try:
        for work in later:
            pool.submit(compile_one, None, work)
        for done in [pool.submit(compile_one, cut, run) for cut in tries]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _fastest(name: str, cuts: Sequence[Tiling], run: Work) -> Tiling:
    """In CUDA graphs, since small products launched one by one take as long as their launches; in turns, as the GPU's
    clock rises."""
    graphs = []
    for cut in cuts:
        _chosen[name] = cut
        run()  # compiles what depends on other products' cuts
        graphs.append(captured(run))
    times = [[_milliseconds(graph) for graph in graphs] for _ in range(12)]
    medians = [statistics.median(each[4:]) for each in zip(*times, strict=True)]
    return cuts[medians.index(min(medians))]


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _name(weight: Tensor, gated: bool) -> str:
    return f"{weight.shape[0]}x{weight.shape[1]} {'gated ' if gated else ''}{weight.dtype} {_gpu(weight.device)}"


@functools.cache
def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    import triton

    return f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"


def _stored() -> dict[str, Tiling]:
    try:
        return {name: Tiling(*cut) for name, cut in json.loads((cache_dir() / FILE).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _store() -> None:
    """A cache that cannot be written costs the next start its measurements, nothing else."""
    with contextlib.suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        fresh = cache_dir() / f"{FILE}.new"
        fresh.write_text(json.dumps(_stored() | {name: cut for name, cut in _chosen.items() if name not in _passing}))
        fresh.replace(cache_dir() / FILE)
