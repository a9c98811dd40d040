"""What cannot be captured, and what a GPU may lack: memory for one more workspace, a compiler for Triton."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from small_models import llama, randomised
from test_gpu_engine import CUDA, OTHERS, PROMPTS, engine_of, is_graph, rows, transformers_greedy
from torch import Tensor

from flashspec import FlashSpecConfig, SpeculativeEngine
from flashspec.engine.graphs import CudaGraphs
from flashspec.models.loading import load_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def ask(module: object, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].sum().item()


def test_a_model_with_host_logic_says_so_once_and_harms_nobody() -> None:
    """A failed capture must leave torch's allocator and random numbers as they were."""
    model = randomised(OTHERS["gpt2"]()).to(CUDA)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    expected = [transformers_greedy(model, prompt, 60) for prompt in PROMPTS]
    asked = model.transformer.h[1].register_forward_pre_hook(ask)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        engine = engine_of(model, None, ["plain", "ngram:4", "suffix:8", "early-exit:2"])
        for _ in range(2):
            assert rows(engine.generate(PROMPTS, 60)) == expected
            assert [rows(engine.generate([prompt], 60))[0] for prompt in PROMPTS] == expected
    (warning,) = (str(each.message) for each in told if each.category is RuntimeWarning)
    assert warning.startswith("steps run without a CUDA graph") and "stream is capturing" in warning
    torch.cuda.empty_cache()
    torch.rand(1, device=CUDA)
    asked.remove()
    sound = engine_of(model, None, ["plain", "ngram:4"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert rows(sound.generate(PROMPTS, 60)) == expected
    (workspace,) = sound.workspaces._kept.values()
    assert all(is_graph(work) for work in workspace._captured.values())


def test_where_memory_runs_out_the_other_workspaces_make_room() -> None:
    model = llama(vocab_size=400, num_hidden_layers=4, head_dim=64, max_position_embeddings=2048, eos_token_id=None)
    config = FlashSpecConfig(device="cuda", sampling={"temperature": 0.0})
    engine = SpeculativeEngine(config, [], load_model(model, device="cuda:0"), arms=["plain"])
    expected = engine.generate([[1, 2, 3]], 8).output_ids.tolist()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine.generate([[1, 2, 3]] * 256, 8)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() - before
    room = torch.cuda.memory_reserved() + held // 8  # a workspace of half the rows takes half of what is held
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert engine.generate([[1, 2, 3]] * 128, 8).output_ids.tolist() == expected * 128
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [len(workspace.state.tokens) for workspace in engine.workspaces._kept.values()] == [128]


def test_graphs_that_become_garbage_spoil_no_capture() -> None:
    def count() -> None:
        counter.add_(1)
        if gc.isenabled():
            gc.collect()  # as any allocation may

    counter = torch.zeros(1, device=CUDA)
    count()
    dead: list[object] = [CudaGraphs(CUDA)(count)]
    dead.append(dead)
    del dead
    repeat = CudaGraphs(CUDA)(count)
    repeat()
    assert counter.item() == 2


def test_without_a_compiler_the_twins_run_and_one_warning_says_so(tmp_path: Path) -> None:
    script = """
import torch
from test_gpu_faults import text_of_a_small_model
from flashspec.kernels import decoding, gather_accepted
device = torch.device("cuda", 0)
kept = gather_accepted(torch.tensor([[3, 4]], device=device), torch.tensor([1], device=device))
print(decoding.available(device), kept.tolist(), text_of_a_small_model())
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("PATH", "CC")}
    paths = [Path(__file__).parent, *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"False [[3, -1]] {text_of_a_small_model()}\n", done.stderr
    assert done.stderr.count("Triton cannot compile for") == 1 and "C compiler" in done.stderr


def text_of_a_small_model() -> list[list[int]]:
    engine = engine_of(llama(vocab_size=400, eos_token_id=None).to(CUDA), None, ["plain", "ngram:4", "suffix:8"])
    return rows(engine.generate([[1, 2, 3] * 5, [4, 5]], 40))
