"""Kernels against the memory's speed and against PyTorch, inside CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashspec.bench.provenance import provenance
from flashspec.bench.report import write_json
from flashspec.core import FlashSpecError
from flashspec.kernels import reference, verify_logits, verify_tokens

BATCH_SIZES, GAMMAS, VOCAB_SIZES = (1, 8, 32), (1, 4, 8, 16), (32_000, 128_256, 151_936)
DTYPES = (torch.float32, torch.bfloat16)
COLD_BYTES = 256e6  # inputs that are read before they come round again: four times an H200's L2


def run(
    output: Path | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    gammas: Sequence[int] = GAMMAS,
    vocab_sizes: Sequence[int] = VOCAB_SIZES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    replays: int = 50,
    calls: int = 10,
    device: str = "cuda",
) -> dict[str, Any]:
    """Returns {"provenance", "settings", "rows"}, written to `output`. microseconds: a call's share of a replayed graph
    of `calls` calls, the median of `replays` replays, of two takes the second; spread: their difference. Inputs are
    warm, as logits are that were just written; cold_microseconds rotates over inputs that no cache holds.
    FlashSpecError without a GPU."""
    if not torch.cuda.is_available():
        raise FlashSpecError("kernels are measured inside CUDA graphs: this machine has no CUDA device")
    time = partial(microseconds, replays=replays, calls=calls)
    bandwidth = copy_bandwidth(device, time)
    rows = []
    for dtype, batch_size, gamma, vocab_size in itertools.product(dtypes, batch_sizes, gammas, vocab_sizes):
        shape = (batch_size, gamma, vocab_size)
        rows.append(_verification(shape, dtype, device, bandwidth, calls, time))
        rows.append(_acceptance_test(shape, dtype, device, time))
        torch.cuda.empty_cache()
    settings = {"replays": replays, "calls": calls, "copy_tb_per_second": round(bandwidth / 1e12, 3)}
    result = {"provenance": provenance(device), "settings": settings, "rows": rows}
    if output is not None:
        write_json(result, output)
    return result


Timer = Callable[[Callable[[int], Any]], tuple[float, float]]


def microseconds(call: Callable[[int], Any], replays: int, calls: int) -> tuple[float, float]:
    """(microseconds, spread) of call(i), captured for i in 0..calls - 1."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    for _ in range(5):
        graph.replay()
    first, second = (_median_replay(graph, replays) / calls for _ in range(2))
    return round(second, 3), round(abs(second - first), 3)


def _median_replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    starts, ends = ([_timed_event() for _ in range(replays)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * median(float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True))


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth(device: str, time: Timer) -> float:
    """Bytes a second, read and written, of a large copy: by a kernel, as copies captured in a graph run slower."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    taken, _ = time(lambda index: torch.neg(source, out=target))
    return 2 * source.nbytes / taken * 1e6


def _verification(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, bandwidth: float, calls: int, time: Timer
) -> dict[str, Any]:
    batch_size, gamma, vocab_size = shape
    n_bytes = batch_size * (2 * gamma + 1) * vocab_size * dtype.itemsize
    inputs = [
        verification_inputs(shape, dtype, device, seed) for seed in range(min(calls, 1 + int(COLD_BYTES // n_bytes)))
    ]
    ours, spread = time(lambda index: verify_logits(**inputs[0], variant="rejection"))
    cold, _ = time(lambda index: verify_logits(**inputs[index % len(inputs)], variant="rejection"))
    pytorch, pytorch_spread = time(lambda index: pytorch_verify(inputs[0]))
    floor = n_bytes / bandwidth * 1e6
    row = {
        **_describe("verify_logits", shape, dtype),
        "bytes": n_bytes,
        "floor_microseconds": round(floor, 3),
        "microseconds": ours,
        "spread": spread,
        "cold_microseconds": cold,
        "roofline_share": round(floor / cold, 3),
        "pytorch_microseconds": pytorch,
        "pytorch_spread": pytorch_spread,
        "speedup_vs_pytorch": round(pytorch / ours, 2),
    }
    if find_spec("flashinfer") is not None:
        chain = import_module("flashinfer.sampling").chain_speculative_sampling
        row["flashinfer_microseconds"], _ = time(lambda index: flashinfer_verify(chain, inputs[0]))
    return row


def _acceptance_test(shape: tuple[int, int, int], dtype: torch.dtype, device: str, time: Timer) -> dict[str, Any]:
    inputs = verification_inputs(shape, dtype, device, 0)
    draft, target = inputs["draft_weights"].log_softmax(-1), inputs["target_logits"][:, :-1].log_softmax(-1)
    u = torch.rand(shape[:2], device=device)
    arguments = (draft, target, u, inputs["draft_token_ids"])
    ours, spread = time(lambda index: verify_tokens(*arguments))
    pytorch, pytorch_spread = time(lambda index: reference.verify_tokens(*arguments))
    return {
        **_describe("verify_tokens", shape, dtype),
        "microseconds": ours,
        "spread": spread,
        "pytorch_microseconds": pytorch,
        "pytorch_spread": pytorch_spread,
        "speedup_vs_pytorch": round(pytorch / ours, 2),
    }


def _describe(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    batch_size, gamma, vocab_size = shape
    names = {"batch_size": batch_size, "gamma": gamma, "vocab_size": vocab_size}
    return {"kernel": kernel, **names, "dtype": str(dtype).removeprefix("torch.")}


def verification_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int) -> dict[str, Tensor]:
    """Drafts near the target, tokens drawn from them, so that rows stop at every length; half sampled cold."""
    batch_size, gamma, vocab_size = shape
    generator = torch.Generator(device).manual_seed(seed)
    target = 2.5 * torch.randn(batch_size, gamma + 1, vocab_size, device=device, generator=generator)
    draft = target[:, :gamma] + 0.5 * torch.randn(shape, device=device, generator=generator)
    noise = torch.empty_like(draft).exponential_(generator=generator)
    return {
        "target_logits": target.to(dtype),
        "draft_token_ids": (draft.softmax(-1) / noise).argmax(-1),
        "draft_lengths": torch.full((batch_size,), gamma, device=device),
        "draft_weights": draft.to(dtype),
        "seeds": torch.randint(2**62, (batch_size,), device=device, generator=generator),
        "lengths": torch.randint(4096, (batch_size,), device=device, generator=generator),
        "temperature": torch.where(torch.arange(batch_size, device=device) % 2 == 0, 1.0, 0.7),
    }


def pytorch_verify(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch, without wasted passes: two softmaxes, one row gathered, an exponential race."""
    target_probs = (inputs["target_logits"].float() / inputs["temperature"][:, None, None]).softmax(-1)
    draft_probs = inputs["draft_weights"].float().softmax(-1)
    ids = inputs["draft_token_ids"]
    batch_size, gamma = ids.shape
    rows = torch.arange(batch_size, device=ids.device)
    p = target_probs[:, :gamma].gather(-1, ids[..., None])[..., 0]
    q = draft_probs.gather(-1, ids[..., None])[..., 0]
    accepted = torch.rand(p.shape, device=p.device) * q < p
    num_accepted = accepted.long().cumprod(1).sum(1)
    chosen = target_probs[rows, num_accepted]  # (B, V)
    drafted = draft_probs[rows, num_accepted.clamp(max=gamma - 1)]
    residual = torch.where((num_accepted < gamma)[:, None], chosen - drafted, chosen).clamp(min=0)
    return num_accepted, (residual / torch.empty_like(residual).exponential_()).argmax(-1)


def flashinfer_verify(chain: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    target_probs = (inputs["target_logits"].float() / inputs["temperature"][:, None, None]).softmax(-1)
    return chain(inputs["draft_weights"].float().softmax(-1), inputs["draft_token_ids"].int(), target_probs)
