"""Drafter heads inside captured steps: the target's text, the drafts of a CPU, no synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import TakingTurns
from small_heads import LAYERS, PART, VOCAB, write_eagle, write_medusa, write_tiny
from small_models import llama
from strict import assert_no_step_synchronises

from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
from flashspec.core import Draft
from flashspec.drafters.base import Drafter
from flashspec.drafters.eagle import EagleDrafter
from flashspec.drafters.heads import load_head
from flashspec.engine.state import DecodeState
from flashspec.models.loading import LoadedModel, load_model
from flashspec.sampling.sampler import make_sampler

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CUDA = torch.device("cuda:0")
PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7], [9, 8, 9, 8, 9, 8, 9, 8]]
HEADS = ("eagle", "whole", "medusa", "shared", "tiny")
EACH = (["eagle:4"], ["whole:3"], ["medusa:3"], ["shared:4"], ["tiny:4"])
MIXED = ["plain", "eagle:2", "tiny:3", "medusa:4", "eagle:12", "ngram:4", "shared:2", "whole:4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`whole` knows every token, the others a part; `shared` scores by the target's LM head, and reads more than its
    final state."""
    folder = tmp_path_factory.mktemp("heads")
    return {
        "eagle": write_eagle(folder / "eagle"),
        "whole": write_eagle(folder / "whole", None, seed=8),
        "medusa": write_medusa(folder / "medusa", part=PART),
        "shared": write_medusa(folder / "shared", own=False, part=PART, beside=True),
        "tiny": write_tiny(folder / "tiny", PART),
    }


def target_on(device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Its weights are what bfloat16 can hold, as a CPU keeps them."""
    model = llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=2048, eos_token_id=None)
    return load_model(model.bfloat16().to(device, dtype))


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return target_on(CUDA)


def engine_of(
    target: LoadedModel, folders: dict[str, Path], arms: Sequence[str], eager: bool = False, **sampling: Any
) -> SpeculativeEngine:
    names = {arm.rpartition(":")[0] for arm in arms} - {""}
    drafters = [load_head(folders[name], target.model, name) if name in HEADS else name for name in sorted(names)]
    config = FlashSpecConfig(device=str(CUDA), sampling={"temperature": 0.0, **sampling})
    engine = SpeculativeEngine(config, drafters, target, TakingTurns(len(arms)), arms=arms)
    if eager:
        engine.workspaces = None
    return engine


def rows(result: Any) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in result.output_ids.tolist()]


@pytest.mark.parametrize("arms", [*EACH, MIXED], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "variant": "coupled", "seed": 3}], ids=str)
def test_the_text_is_that_of_plain_decoding(
    target: LoadedModel, folders: dict[str, Path], arms: list[str], settings: dict[str, Any]
) -> None:
    expected = rows(engine_of(target, folders, ["plain"], **settings).generate(PROMPTS, 60))
    engine = engine_of(target, folders, arms, **settings)
    for _ in range(2):  # the second time nothing is left to capture
        assert rows(engine.generate(PROMPTS, 60)) == expected
        assert [rows(engine.generate([prompt], 60))[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("count, length", [(3, 3), (2, 4)])  # at most 16 tokens: three rows run as four
def test_bfloat16_text_is_that_of_plain_decoding_bit_for_bit(folders: dict[str, Path], count: int, length: int) -> None:
    target, prompts = target_on(CUDA, torch.bfloat16), PROMPTS[:count]
    expected = rows(engine_of(target, folders, ["plain"]).generate(prompts, 60))
    engine = engine_of(target, folders, ["plain", *(f"{head}:{length}" for head in HEADS)])
    assert rows(engine.generate(prompts, 60)) == rows(engine.generate(prompts, 60)) == expected


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "three"])
def test_graphs_accept_what_eager_steps_accept(
    target: LoadedModel, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    """At a temperature of 5 most drafts are accepted, and any other draft is another text."""
    options: dict[str, Any] = {"temperature": 5.0, "seed": 3}
    captured, eager = (engine_of(target, folders, MIXED, eager, **options) for eager in (False, True))
    captured.generate(prompts, 60)
    for engine in (captured, eager):
        engine.selector_for = lambda rows, costs: TakingTurns(len(MIXED))
    found, expected = captured.generate(prompts, 60), eager.generate(prompts, 60)
    assert rows(found) == rows(expected)
    assert [step.rows for step in found.steps] == [step.rows for step in expected.steps]
    assert found.acceptance_length > 1.5


def first_draft(target: LoadedModel, drafter: Drafter, length: int) -> Draft:
    model = target.model
    sampler = make_sampler(SamplingConfig(temperature=1.0), PROMPTS, [], VOCAB, 1, model.device)
    state = DecodeState.create(PROMPTS, [40] * len(PROMPTS), [], model, sampler)
    state.prepare()
    proposer = drafter.start(state)
    proposer.prepare(state)
    return proposer.propose(state, length)


@pytest.mark.parametrize("name", HEADS)
@torch.inference_mode()
def test_drafts_are_those_of_a_cpu(target: LoadedModel, folders: dict[str, Path], name: str) -> None:
    on_cpu = target_on(torch.device("cpu"))
    ours, theirs = (load_head(folders[name], t.model, name) for t in (target, on_cpu))
    if isinstance(theirs, EagleDrafter):
        theirs.head._packed = None  # its weights are rounded to eight bits
    here, there = first_draft(target, ours, 4), first_draft(on_cpu, theirs, 4)
    assert here.token_ids.tolist() == there.token_ids.tolist()
    assert here.logits is not None and there.logits is not None
    torch.testing.assert_close(here.logits.cpu(), there.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_an_eagle_heads_kernels_draft_as_pytorch(folders: dict[str, Path], dtype: torch.dtype) -> None:
    target = target_on(CUDA, dtype)
    fast, plain = (load_head(folders["eagle"], target.model, "eagle") for _ in range(2))
    assert isinstance(fast, EagleDrafter) and fast.head._fused is not None
    assert isinstance(plain, EagleDrafter)
    plain.head._few_tokens = plain.head._fused = None
    ours, theirs = (first_draft(target, drafter, 1).logits for drafter in (fast, plain))
    assert ours is not None and theirs is not None
    ours, theirs = ours[..., PART], theirs[..., PART]
    assert (ours - theirs).norm() / theirs.norm() < (1e-4 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("arms", [*EACH, MIXED], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_step_synchronises(
    target: LoadedModel, folders: dict[str, Path], arms: list[str], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_no_step_synchronises(engine_of(target, folders, arms, temperature=temperature, seed=1), PROMPTS, monkeypatch)
