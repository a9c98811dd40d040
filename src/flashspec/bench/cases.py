"""What `flashspec bench kernels` measures: a family is a function from a grid to cases. A new kernel is a few lines
here and an entry in FAMILIES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flashspec.bench.shapes import SHAPES, Filler, Shape
from flashspec.kernels import decoding, reference, reference_decoder, verify_logits, verify_tokens

Call = Callable[[int], Any]  # works on input set i % sets
COLD_BYTES = 256e6  # inputs that are read before they come round again: four times an H200's L2
MOST_SETS = 64  # below 4 MB a set some of them stay in a cache


@dataclass(frozen=True, slots=True)
class Case:
    """names tell its row apart. n_bytes: what has to be moved at least; None where the kernel reads next to nothing.
    sets: input sets to rotate over, enough that no cache holds them. baselines: the same work by others.
    always_cold: nothing finds its inputs in a cache, as it is with weights; else they are what was just written."""

    kernel: str
    names: Mapping[str, Any]
    n_bytes: int | None
    sets: int
    ours: Call
    baselines: Mapping[str, Call] = field(default_factory=dict)
    always_cold: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    batch_sizes: Sequence[int] = (1, 8, 32)
    gammas: Sequence[int] = (1, 4, 8, 16)
    vocab_sizes: Sequence[int] = (32_000, 128_256, 151_936)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    shapes: Sequence[Shape] = (SHAPES["1b"], SHAPES["8b"], SHAPES["70b"])
    tokens: Sequence[int] = (1, 5)
    prompts: Sequence[int] = (128, 256)
    context: int = 1024
    device: str = "cuda"

    def verifications(self) -> Iterator[tuple[tuple[int, int, int], torch.dtype]]:
        for dtype, *shape in itertools.product(self.dtypes, self.batch_sizes, self.gammas, self.vocab_sizes):
            yield (shape[0], shape[1], shape[2]), dtype

    def products(self) -> Iterator[tuple[Shape, str, int, int, int]]:
        """shape, name of the matrix, its rows and columns, tokens"""
        for shape in self.shapes:
            for name, (rows, columns) in shape.matrices.items():
                for tokens in self.tokens:
                    yield shape, name, rows, columns, tokens

    def attentions(self) -> Iterator[tuple[Shape, int, int]]:
        """shape, batch size, query tokens a row"""
        yield from itertools.product(self.shapes, self.batch_sizes, self.tokens)
        yield from itertools.product(self.shapes, (1,), self.prompts)


QUICK = Grid(batch_sizes=(1, 8), gammas=(4,), vocab_sizes=(128_256,), shapes=(SHAPES["8b"],))


def sets(n_bytes: int) -> int:
    return min(MOST_SETS, 1 + int(COLD_BYTES // n_bytes))


def _verify_logits(shape: tuple[int, int, int], dtype: torch.dtype, grid: Grid) -> Case:
    batch_size, gamma, vocab_size = shape
    n_bytes = batch_size * (2 * gamma + 1) * vocab_size * dtype.itemsize
    inputs = [verification_inputs(shape, dtype, grid.device, seed) for seed in range(sets(n_bytes))]
    baselines: dict[str, Call] = {"pytorch": lambda index: pytorch_verify(inputs[index])}
    if find_spec("flashinfer") is not None:
        sampling = import_module("flashinfer.sampling")
        taken = [flashinfer_inputs(one) for one in inputs]
        baselines["flashinfer"] = lambda index: flashinfer_verify(sampling, taken[index])
    names = verification_names(shape, dtype)
    return Case(
        kernel="verify_logits",
        names=names,
        n_bytes=n_bytes,
        sets=len(inputs),
        ours=lambda index: verify_logits(*inputs[index], variant="rejection"),
        baselines=baselines,
    )


def _verify_tokens(shape: tuple[int, int, int], dtype: torch.dtype, grid: Grid) -> Case:
    inputs = verification_inputs(shape, dtype, grid.device, 0)
    draft, target = inputs.draft_weights.log_softmax(-1), inputs.target_logits[:, :-1].log_softmax(-1)
    arguments = (draft, target, torch.rand(shape[:2], device=grid.device), inputs.draft_token_ids)
    names = verification_names(shape, dtype)
    baselines: dict[str, Call] = {"pytorch": lambda index: reference.verify_tokens(*arguments)}
    return Case("verify_tokens", names, None, 1, lambda index: verify_tokens(*arguments), baselines)


def _product(shape: Shape, name: str, rows: int, columns: int, tokens: int, grid: Grid) -> Case:
    """A few tokens times a weight matrix, which costs what reading the matrix costs; cut as is best for it alone."""
    filler = Filler(torch.bfloat16, torch.device(grid.device), 0)
    n_bytes = rows * columns * torch.bfloat16.itemsize
    weights = [filler.matrix(rows, columns) for _ in range(sets(n_bytes))]
    x = filler.matrix(tokens, columns)
    if decoding.available(filler.device):
        import_module("flashspec.kernels.linear").tune(weights[0], keep=False)
    project = _decoder_kernels(filler.device)[0]
    return Case(
        kernel="product",
        names={"shape": f"{shape.title} {name} {rows} x {columns}", "queries": tokens, "dtype": "bfloat16"},
        n_bytes=n_bytes,
        sets=len(weights),
        ours=lambda index: project(x, weights[index], None, None, 0.0, torch.bfloat16),
        baselines={"pytorch": lambda index: functional.linear(x, weights[index])},
        always_cold=True,
    )


def _attention(shape: Shape, batch_size: int, tokens: int, grid: Grid) -> Case:
    """Ours normalises nothing here, but rotates and writes the new keys and values; PyTorch only attends, and gets a
    mask only where something is hidden, as its fastest kernels take none. bytes are the cache's alone."""
    filler = Filler(torch.bfloat16, torch.device(grid.device), 0)
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    n_bytes = 2 * batch_size * kv_heads * grid.context * dim * torch.bfloat16.itemsize
    caches = [filler.matrix(2, batch_size, kv_heads, grid.context, dim) for _ in range(sets(n_bytes))]
    qkv = filler.matrix(batch_size * tokens, (heads + 2 * kv_heads) * dim)
    queries = filler.matrix(batch_size, heads, tokens, dim)
    waves = torch.ones(batch_size * tokens, 2, dim // 2, device=filler.device)
    places = torch.arange(grid.context - tokens, grid.context, device=filler.device)  # (Q,)
    positions = places.expand(batch_size, -1).contiguous()
    mask = torch.arange(grid.context, device=filler.device) <= places[:, None] if tokens > 1 else None  # (Q, context)
    attend = _decoder_kernels(filler.device)[1]
    return Case(
        kernel="attention",
        names={"shape": shape.title, "batch_size": batch_size, "queries": tokens, "context": grid.context}
        | {"dtype": "bfloat16"},
        n_bytes=n_bytes,
        sets=len(caches),
        ours=lambda index: attend(qkv, waves, positions, *caches[index], None, -1.0, None),
        baselines={
            "pytorch": lambda index: functional.scaled_dot_product_attention(
                queries, caches[index][0], caches[index][1], attn_mask=mask, enable_gqa=True
            )
        },
        always_cold=True,
    )


def _decoder_kernels(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """project and attend of `kernels.decoding`."""
    if decoding.available(device):
        return import_module("flashspec.kernels.linear").project, import_module("flashspec.kernels.attention").attend
    return reference_decoder.project, reference_decoder.attend


FAMILIES: dict[str, Callable[[Grid], Iterator[Case]]] = {
    "verify_logits": lambda grid: (_verify_logits(*point, grid) for point in grid.verifications()),
    "verify_tokens": lambda grid: (_verify_tokens(*point, grid) for point in grid.verifications()),
    "product": lambda grid: (_product(*point, grid) for point in grid.products()),
    "attention": lambda grid: (_attention(*point, grid) for point in grid.attentions()),
}


def verification_names(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    return dict(zip(("batch_size", "gamma", "vocab_size"), shape, strict=True)) | {"dtype": dtype_name(dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Verification(NamedTuple):
    """What `verify_logits` takes, in its order."""

    target_logits: Tensor
    draft_token_ids: Tensor
    draft_lengths: Tensor
    draft_weights: Tensor
    seeds: Tensor
    lengths: Tensor
    temperature: Tensor


def verification_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int) -> Verification:
    """Drafts near the target, tokens drawn from them, so that rows stop at every length; half sampled cold."""
    batch_size, gamma, vocab_size = shape
    generator = torch.Generator(device).manual_seed(seed)
    target = 2.5 * torch.randn(batch_size, gamma + 1, vocab_size, device=device, generator=generator)
    draft = target[:, :gamma] + 0.5 * torch.randn(shape, device=device, generator=generator)
    noise = torch.empty_like(draft).exponential_(generator=generator)
    return Verification(
        target_logits=target.to(dtype),
        draft_token_ids=(draft.softmax(-1) / noise).argmax(-1),
        draft_lengths=torch.full((batch_size,), gamma, device=device),
        draft_weights=draft.to(dtype),
        seeds=torch.randint(2**62, (batch_size,), device=device, generator=generator),
        lengths=torch.randint(4096, (batch_size,), device=device, generator=generator),
        temperature=torch.where(torch.arange(batch_size, device=device) % 2 == 0, 1.0, 0.7),
    )


def pytorch_verify(inputs: Verification) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch, without wasted passes: two softmaxes, one row gathered, an exponential race."""
    target_probs = (inputs.target_logits.float() / inputs.temperature[:, None, None]).softmax(-1)
    draft_probs = inputs.draft_weights.float().softmax(-1)
    ids = inputs.draft_token_ids
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


class Chain(NamedTuple):
    """A verification as FlashInfer takes it; seeds and offsets on the device, as graphs need them."""

    target_logits: Tensor  # (B * (γ + 1), V)
    temperature: Tensor  # (B * (γ + 1),)
    draft_logits: Tensor  # (B * γ, V)
    draft_token_ids: Tensor  # (B, γ) int32
    seeds: Tensor  # (B,) int64
    offsets: Tensor  # (B,) int64


def flashinfer_inputs(inputs: Verification) -> Chain:
    target, draft = inputs.target_logits.flatten(0, 1), inputs.draft_weights.flatten(0, 1)
    temperature = inputs.temperature.repeat_interleave(inputs.target_logits.shape[1])
    return Chain(target, temperature, draft, inputs.draft_token_ids.int(), inputs.seeds, inputs.lengths)


def flashinfer_verify(sampling: Any, inputs: Chain) -> Any:
    """Its own softmax twice, and its chain of rejections."""
    batch_size, gamma = inputs.draft_token_ids.shape
    draft_probs = sampling.softmax(inputs.draft_logits).view(batch_size, gamma, -1)
    target_probs = sampling.softmax(inputs.target_logits, inputs.temperature).view(batch_size, gamma + 1, -1)
    return sampling.chain_speculative_sampling(
        draft_probs, inputs.draft_token_ids, target_probs, seed=inputs.seeds, offset=inputs.offsets
    )
