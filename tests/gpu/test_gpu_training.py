"""A short training on a GPU: mixed precision, texts from graphs, and a drafter that the engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import llama

from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.drafters.heads import load_head
from flashspec.engine import SpeculativeEngine
from flashspec.training import Kind, Settings, train_drafter
from flashspec.training.target import load_target

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_training_on_a_gpu(tmp_path: Path, kind: Kind) -> None:
    model = llama(num_hidden_layers=3, max_position_embeddings=128)
    model.lm_head.weight.mul_(6.0)
    model.save_pretrained(tmp_path / "target")
    settings = Settings(
        kind=kind, seconds=30.0, writing_share=0.5, length=64, rows=64, most_tokens=20_000, learning_rate=3e-3
    )
    outcome = train_drafter(tmp_path / "target", tmp_path / "head", settings, device="cuda")
    assert outcome.measures[-1].loss < outcome.measures[0].loss
    assert outcome.measures[-1].length > outcome.measures[0].length

    target = load_target(tmp_path / "target", "cuda")
    drafter = load_head(tmp_path / "head", target.loaded.model, "head")
    config = FlashSpecConfig(device="cuda", sampling=SamplingConfig(temperature=0.0))
    result = SpeculativeEngine(config, [drafter], target.loaded, arms=["head:4"]).generate(
        [[i, i + 1, i + 2] for i in range(16)], 40
    )
    assert result.acceptance_length > 1.0
