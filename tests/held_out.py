"""What a trained head does in the engine, to hold against what its training measured."""

from __future__ import annotations

from pathlib import Path

from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.drafters.heads import load_head
from flashspec.engine import SpeculativeEngine
from flashspec.training.measure import summarise
from flashspec.training.rollouts import RolloutFolder
from flashspec.training.target import load_target


def tokens_a_step(source: Path, folder: Path, device: str = "cpu", same_text: bool = True) -> float:
    """Of the head in a folder, by the engine, on the texts that its training held out. same_text: the engine should
    write them again, which in 16 bits it need not."""
    target = load_target(source, device)
    drafter = load_head(folder, target.loaded.model, "head")
    config = FlashSpecConfig(device=device, sampling=SamplingConfig(temperature=0.0))
    engine = SpeculativeEngine(config, [drafter], target.loaded, arms=["head:4"])
    counts = []
    texts = RolloutFolder.open(folder / "training" / "rollouts").load()
    for index in texts.held_out.nonzero()[:, 0].tolist():
        start, length = int(texts.starts[index]), int(texts.lengths[index])
        text = texts.token_ids[texts.offsets[index] : texts.offsets[index + 1]].tolist()
        result = engine.generate([text[:start]], length - start)
        assert not same_text or result.output_ids[0].tolist() == text[start:]
        for step in result.steps:
            if start + 4 > length:
                break
            counts.append(step.rows[0].accepted)
            start += counts[-1] + 1
    return summarise(counts, 4)[1]
