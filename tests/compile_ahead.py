"""Compiles the direct product for GPUs that need not be there. Prints JSON: PTX by "capability role tokens"."""

from __future__ import annotations

import itertools
import json

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from flashspec.kernels import direct

POINTERS = (
    "x_ptr",
    "weight_ptr",
    "out_ptr",
    "bias_ptr",
    "squares_ptr",
    "hidden_ptr",
    "norm_ptr",
    "weighted_ptr",
    "parts_ptr",
)
ROLES: dict[str, dict[str, str]] = {
    "plain": {},
    "project": {"bias_ptr": "*bf16", "squares_ptr": "*fp32"},
    "gated": {"squares_ptr": "*fp32"},
    "add": {"hidden_ptr": "*bf16", "norm_ptr": "*bf16", "weighted_ptr": "*bf16", "parts_ptr": "*fp32"},
}


def assembly(capability: int, role: str, tokens: int, K: int = 576) -> str:
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16"} | ROLES[role]
    constants: dict[str, object] = dict.fromkeys(POINTERS) | {
        "K": K, "TOKENS": tokens, "ROWS": direct.ROWS, "WARPS": direct.WARPS, "DEPTH": direct.DEPTH, "AHEAD": 2,
        "HELD": 1, "INPUTS_AHEAD": 2, "SQUARES": 64 if "squares_ptr" in pointers else 0, "GATED": role == "gated",
        "EARLY": False, "OVERLAP": capability >= 90,
    }  # fmt: skip
    for name in pointers:
        del constants[name]
    names = direct._direct_kernel.arg_names
    kinds = (
        pointers | {"M": "i32", "N": "i32", "n_squares": "i32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    )
    source = GluonASTSource(
        direct._direct_kernel,
        {name: kinds[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "N")},
    )
    options = {"num_warps": direct.WARPS, "maxnreg": direct.REGISTERS}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


if __name__ == "__main__":
    calls = itertools.product((80, 90), ROLES, (8, 16))
    print(json.dumps({" ".join(map(str, call)): assembly(*call) for call in calls}))
