"""Heads in the package: found by the weights of their target, and used unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_heads import LAYERS, VOCAB, write_eagle
from small_models import llama

from flashspec import SpeculativeEngine
from flashspec.core import FlashSpecError
from flashspec.drafters import shipped
from flashspec.drafters.eagle import EagleDrafter
from flashspec.drafters.heads import head_kind, likeness, target_hash
from flashspec.drafters.shipped import shipped_heads
from flashspec.engine.arms import default_drafters, make_drafter
from flashspec.models.base import SharesVocabulary, Vocabulary
from flashspec.models.loading import LoadedModel, load_model
from flashspec.models.native import NativeModel

MOST_BYTES = 12_000_000


@pytest.mark.parametrize("folder", sorted(shipped.FOLDER.iterdir()), ids=lambda folder: folder.name)
def test_a_head_of_the_package_has_a_card_and_is_small(folder: Path) -> None:
    assert folder.name.endswith(str(head_kind(folder)))
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
    card = (folder / "README.md").read_text("utf-8")
    for told in ("Licence", "revision", "Seed", "Data", "Reads", "tokens a step"):
        assert told in card
    marks = json.loads((folder / "config.json").read_text())["flashspec"]
    assert marks["target_hash"] and marks["target_hash_float16"] and marks["target_likeness"]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model whose head is the only one in the package."""
    llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=96).save_pretrained(tmp_path / "target")
    loaded = load_model(tmp_path / "target", dtype="float32")
    (tmp_path / "heads").mkdir()
    folder = write_eagle(tmp_path / "heads" / "one")
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(loaded.model, SharesVocabulary)
    names = {
        "target_hash": target_hash(loaded.model.sample()),
        "target_hash_float16": target_hash(loaded.model.sample(), torch.float16),
    }
    marks = {"kind": "eagle3", "target": "target", "target_likeness": likeness(loaded.model.sample()), **names}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB, "flashspec": marks}))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "heads")
    return loaded


def test_a_target_gets_its_head_unasked(target: LoadedModel) -> None:
    assert default_drafters(target.model) == ["suffix", "eagle3"]
    engine = SpeculativeEngine.from_pretrained(target)
    assert "eagle3" in {arm.drafter for arm in engine.arms}
    alone = SpeculativeEngine.from_pretrained(target, ["eagle3"])
    plain = SpeculativeEngine.from_pretrained(target, [])
    texts = [one.generate([[3, 7, 1]], 20, temperature=0).output_ids.tolist() for one in (engine, alone, plain)]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_target_gets_its_head_in_any_precision(target: LoadedModel, tmp_path: Path, dtype: str) -> None:
    assert default_drafters(load_model(tmp_path / "target", dtype=dtype).model) == ["suffix", "eagle3"]


def test_a_start_unpacks_the_vocabulary_once(target: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all where the head is another's: its first rows tell."""
    if not isinstance(target.model, NativeModel):
        pytest.skip("needs the native kernel")
    asked, vocabulary = [], NativeModel.vocabulary

    def noted(model: NativeModel) -> Vocabulary:
        asked.append(model)
        return vocabulary(model)

    monkeypatch.setattr(NativeModel, "vocabulary", noted)
    SpeculativeEngine.from_pretrained(target)
    assert len(asked) == 1
    path = shipped.FOLDER / "one" / "config.json"
    text = path.read_text().replace(target_hash(target.model.sample()), "0" * 64)
    path.write_text(text.replace(likeness(target.model.sample()), "AAAA"))
    assert default_drafters(target.model) == ["suffix"] and len(asked) == 1


def test_other_weights_of_the_same_sizes_have_none(target: LoadedModel, tmp_path: Path) -> None:
    other = llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=96)
    other.model.embed_tokens.weight.data = other.model.embed_tokens.weight.data.flip(0)
    for dtype in ("float32", "bfloat16", "float16"):
        model = load_model(other, dtype=dtype).model
        assert shipped_heads(model) == {} and default_drafters(model) == ["suffix"]
    with pytest.raises(FlashSpecError, match="no eagle3 head comes with FlashSpec for this target: make one with"):
        SpeculativeEngine.from_pretrained(other, ["eagle3"])
    with pytest.raises(FlashSpecError, match="no medusa head comes"):
        SpeculativeEngine.from_pretrained(target, ["medusa"])


def test_a_revision_has_them_with_a_warning(target: LoadedModel) -> None:
    near = llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=96)
    for parameter in near.parameters():
        parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2))
    with pytest.warns(RuntimeWarning, match="was trained for target, .* the text stays its own"):
        engine = SpeculativeEngine.from_pretrained(near)
    assert "eagle3" in {arm.drafter for arm in engine.arms}


def test_a_folder_of_that_name_goes_first(target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped.FOLDER.joinpath("one").rename(tmp_path / "medusa")
    monkeypatch.chdir(tmp_path)
    drafter = make_drafter("medusa", target.model, lambda source: pytest.fail("it is no model"))
    assert isinstance(drafter, EagleDrafter)


def test_a_fixed_arm_is_one(target: LoadedModel) -> None:
    assert [arm.drafter for arm in SpeculativeEngine.from_pretrained(target, bandit={"strategy": "fixed"}).arms] == [
        "suffix"
    ]
