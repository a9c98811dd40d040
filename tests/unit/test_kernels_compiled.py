"""Kernels compiled without a GPU, and the one that has no interpreter, Gluon, run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashspec.kernels import TRITON_AVAILABLE
from flashspec.kernels import reference_decoder as twin

if not TRITON_AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)

from flashspec.kernels import direct, linear, tiling

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    """By a process of its own: Triton's interpreter, which other tests run, leaves nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compile_ahead.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def loads(text: str) -> list[str]:
    return [line for line in text.splitlines() if "ld.global" in line]


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("role", ["plain", "project", "gated", "add"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_to_wide_loads_and_one_wait(
    capability: int, role: str, tokens: int, assembly: dict[str, str]
) -> None:
    text = assembly[f"product {capability} {role} {tokens}"]
    before, _, after = text.partition("griddepcontrol.wait")
    assert text.count("griddepcontrol.wait") == (capability >= 90) and "griddepcontrol.wait" not in after
    if capability >= 90:  # steps of two rows, or of a gate's two rows as well, wait in registers
        held = direct.schedule(torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta"), tokens, role == "gated")[
            "HELD"
        ]
        places = {line.partition("[")[2].partition("]")[0] for line in loads(before) if ".v4." in line}
        assert len(places) == held * (4 if role == "gated" else 2)
    if role == "plain":
        assert all(".v4." in line for line in loads(text))


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to("cuda", dtype)


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual.double() - expected.double()).norm() < 6e-3 * expected.double().norm())


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", ["rotated", "given", "one"])
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_compiles(capability: int, kind: str, chunks: int, assembly: dict[str, str]) -> None:
    """Triton's interpreter takes what its compiler does not."""
    text = assembly[f"attend {capability} {kind} {chunks}"]
    assert text.count("griddepcontrol.wait") == (capability >= 90) and "mma" in text


@pytest.mark.parametrize("role", ["plain", "project", "gated", "add", "bytes"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_other_products_compile(capability: int, role: str, assembly: dict[str, str]) -> None:
    text = assembly[f"linear {capability} {role}"]
    before, _, _ = text.partition("griddepcontrol.wait")
    assert "mma" in text and text.count("griddepcontrol.wait") == (capability >= 90)
    if capability >= 90:  # what launches before this one wrote is read behind the wait
        assert "prefetch" in before and not loads(before) and "cp.async.cg" not in before
        assert text.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize("name", ["combine", "embed", "join"])
@pytest.mark.parametrize("capability", [80, 90])
def test_small_kernels_compile(capability: int, name: str, assembly: dict[str, str]) -> None:
    text = assembly[f"small {capability} {name}"]
    before, _, after = text.partition("griddepcontrol.wait")
    assert text.count("griddepcontrol.wait") == text.count("griddepcontrol.launch_dependents") == (capability >= 90)
    if capability >= 90:
        early, late = ([".b64" in line for line in loads(side)] for side in (before, after))  # positions and ids
        assert early == [True] and late if name == "combine" else early and not any(early) and any(late)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("outputs", "depth"), [(16, 8), (33, 264), (48, 1000), (640, 2048), (72, 8192)])
def test_a_token_is_right_and_has_the_same_bits_alone_and_among_others(
    outputs: int, depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = normal(16, depth, dtype=dtype), normal(outputs, depth, dtype=dtype, scale=depth**-0.5)
    both, bias = normal(2 * outputs, depth, dtype=dtype, scale=depth**-0.5), normal(outputs, dtype=dtype)
    hidden, norm, squares = normal(16, outputs, dtype=dtype), normal(outputs, dtype=dtype), normal(16, 70).square()
    monkeypatch.setattr(tiling, "guess", lambda *_: tiling.DIRECT)
    assert direct.takes(weight) and tiling.DIRECT in tiling._candidates(both, True)

    def results(tokens: int) -> tuple[Tensor, ...]:
        few, of_few = x[:tokens].contiguous(), squares[:tokens].contiguous()
        projected = linear.project(few, weight, bias, of_few, 1e-5, torch.float32)
        gated = linear.project_gated(few, both, of_few, 1e-5)
        return projected, gated, *linear.project_add(few, weight, bias, hidden[:tokens].contiguous(), norm)

    every = results(16)
    assert near(every[0], twin.project(x.float(), weight.float(), bias.float(), squares, 1e-5, torch.float32))
    assert near(every[1], twin.project_gated(x.float(), both.float(), squares, 1e-5))
    expected = twin.project_add(x.float(), weight.float(), bias.float(), hidden.float(), norm.float())
    assert near(every[2], expected[0]) and near(every[3], every[2].float() * norm.float())
    torch.testing.assert_close(every[4].sum(1), every[2].float().square().sum(1), rtol=1e-5, atol=0)
    for tokens in (1, 2, 5, 8, 9, 13):
        assert all(torch.equal(one, many[:tokens]) for one, many in zip(results(tokens), every, strict=True))


@on_a_gpu
def test_what_it_does_not_take() -> None:
    assert not direct.takes(normal(16, 64)) and not direct.takes(normal(16, 60, dtype=torch.bfloat16))
    assert not direct.takes(torch.empty(direct.MOST_BYTES // 2048, 1024, dtype=torch.bfloat16, device="cuda"))
    assert not direct.takes(torch.zeros(16, 64, dtype=torch.bfloat16))


@on_a_gpu
def test_where_gluon_fails_the_other_kernel_serves_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise TypeError("no such layout\nat line 1")

    monkeypatch.setattr(direct, "launch", fails)
    direct._usable.cache_clear()
    weight = normal(16, 64, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"\(no such layout\): products are slower"):
        assert not direct.takes(weight)
    likeliest = tiling.guess(weight)
    others = [cut for cut in tiling.CANDIDATES if cut != likeliest]
    assert tiling._candidates(weight, False) == (likeliest, *others) and len(others) == len(tiling.CANDIDATES) - 1
    direct._usable.cache_clear()
