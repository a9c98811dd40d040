"""A short training on a GPU: mixed precision, texts from graphs, and a drafter that the engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from held_out import tokens_a_step
from small_models import llama

from flashspec.training import Kind, Settings, train_drafter

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
    # Near ties fall either way in bfloat16, in the text and in the draft.
    assert tokens_a_step(tmp_path / "target", tmp_path / "head", "cuda", same_text=False) == pytest.approx(
        outcome.measures[-1].length, rel=0.1
    )
