"""Compiles kernels for GPUs that need not be there. Prints a JSON object, PTX by the name of a case."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flashspec.kernels import attention, direct, elementwise, linear, tiling

ROLES: dict[str, dict[str, str]] = {
    "plain": {},
    "project": {"bias_ptr": "*bf16", "squares_ptr": "*fp32"},
    "gated": {"squares_ptr": "*fp32"},
    "add": {"hidden_ptr": "*bf16", "norm_ptr": "*bf16", "weighted_ptr": "*bf16", "parts_ptr": "*fp32"},
}


def assembly(kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """Pointers that are not given are None, other arguments that are not constants are numbers, i32 but for these."""
    names = kernel.arg_names
    constants = {name: None for name in names if name.endswith("_ptr") and name not in pointers} | constants
    kinds = {"eps": "fp32", "scale": "fp32", "wave_scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options |= {"launch_pdl": True} if capability >= 90 else {}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def product(capability: int, role: str, tokens: int) -> str:
    """An 8B model's size, of which the last step of `add` is not whole."""
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16"} | ROLES[role]
    weight = torch.empty(4096, 4096 - 24 * (role == "add"), dtype=torch.bfloat16, device="meta")
    constants = direct.schedule(weight, tokens, role == "gated") | {
        "K": weight.shape[1], "SQUARES": 256 if "squares_ptr" in pointers else 0, "OVERLAP": capability >= 90,
    }  # fmt: skip
    kernel = direct._direct_kernel
    return assembly(kernel, capability, pointers, constants, num_warps=direct.WARPS, maxnreg=direct.REGISTERS)


def attend(capability: int, kind: str, chunks: int) -> str:
    """kind: 'rotated' with norms, 'given' as transformers' models bring them, or 'one' split, with sinks."""
    pointers = dict.fromkeys(("qkv_ptr", "keys_ptr", "values_ptr"), "*bf16") | {"positions_ptr": "*i64"}
    if kind != "given":
        pointers |= {"waves_ptr": "*fp32", "norm_ptr": "*bf16"}
    alone = {"out_ptr": "*bf16", "sinks_ptr": "*bf16"}
    pointers |= alone if kind == "one" else {"mixed_ptr": "*fp32", "stats_ptr": "*fp32"}
    constants = {
        "GROUP": 4, "DIM": 64, "HALF_PAD": 32, "DIM_PAD": 64, "PACKED": 16, "QUERIES": 2, "CHUNK": 128 // chunks,
        "CHUNKS": chunks, "CAP": None, "ALONE": chunks == 1, "WINDOWED": kind == "given", "OVERLAP": capability >= 90,
    }  # fmt: skip
    return assembly(attention._attend_kernel, capability, pointers, constants, num_warps=attention.WARPS)


def linear_product(capability: int, role: str) -> str:
    """role: of a product, or 'bytes' for a gate's weights in eight bits."""
    pointers = dict.fromkeys(("x_ptr", "weight_ptr"), "*i8" if role == "bytes" else "*bf16") | {"out_ptr": "*bf16"}
    pointers |= {"scales_ptr": "*fp32", "token_scales_ptr": "*fp32"} if role == "bytes" else ROLES[role]
    cut = tiling.OF_BYTES[0] if role == "bytes" else tiling.CANDIDATES[2]
    constants = {
        "TOKENS": 16, "ROWS": cut.rows, "STRANDS": cut.strands, "DEPTH": cut.depth, "THREADS": 32 * cut.warps,
        "EVEN": role != "add", "SQUARES": 256 if "squares_ptr" in pointers else 0, "GATED": role in ("gated", "bytes"),
        "OVERLAP": capability >= 90, "LATE": role == "gated",
    }  # fmt: skip
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return assembly(linear._linear_kernel, capability, pointers, constants, **options)


def small(capability: int, name: str) -> str:
    """'combine', 'embed' or 'join'."""
    ids = {"token_ids_ptr": "*i64", "positions_ptr": "*i64"}
    floats = {"frequencies_ptr": "*fp32", "waves_ptr": "*fp32"}
    cases: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "combine": (
            attention._combine_kernel,
            {"mixed_ptr": "*fp32", "stats_ptr": "*fp32", "positions_ptr": "*i64", "out_ptr": "*bf16"},
            {"GROUP": 4, "DIM": 64, "DIM_PAD": 64, "SPLITS": 8, "SLOTS": 128, "WINDOWED": False},
        ),
        "embed": (
            elementwise._embed_kernel,
            ids | floats | {"squares_ptr": "*fp32"}
            | dict.fromkeys(("embedding_ptr", "norm_ptr", "hidden_ptr", "weighted_ptr"), "*bf16"),
            {"WIDTH": 1024, "HALF": 32, "SQUARES": 64},
        ),
        "join": (
            elementwise._join_kernel,
            ids | floats
            | dict.fromkeys(
                ("embedding_ptr", "embedding_norm_ptr", "hidden_ptr", "hidden_norm_ptr", "both_ptr"), "*bf16"
            ),
            {"WIDTH": 1024, "HALF": 32},
        ),
    }  # fmt: skip
    kernel, pointers, constants = cases[name]
    return assembly(kernel, capability, pointers, constants | {"OVERLAP": capability >= 90}, num_warps=4)


if __name__ == "__main__":
    found = {f"product {' '.join(map(str, c))}": product(*c) for c in itertools.product((80, 90), ROLES, (8, 16))}
    for call in itertools.product((80, 90), ("rotated", "given", "one"), (1, 2)):
        found[f"attend {' '.join(map(str, call))}"] = attend(*call)
    for capability in (80, 90):
        found |= {f"linear {capability} {role}": linear_product(capability, role) for role in (*ROLES, "bytes")}
        found |= {f"small {capability} {name}": small(capability, name) for name in ("combine", "embed", "join")}
    print(json.dumps(found))
