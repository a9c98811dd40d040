"""GGUF files as the gguf package writes them, and as damage leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import llama, write_gguf

from flashspec.core import FlashSpecError
from flashspec.models.gguf import GgufFile

PROJECTION = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", llama(attention_bias=True))


@pytest.mark.parametrize(("kind", "error"), [("F32", 0), ("F16", 1e-3), ("Q8_0", 0.01), ("Q4_1", 0.1), ("Q5_0", 0.1)])
def test_tensors_are_the_models_own(tmp_path: Path, kind: str, error: float) -> None:
    model = llama(attention_bias=True)
    file = GgufFile(write_gguf(tmp_path / "model.gguf", model, kind))
    for name, tensor in model.state_dict().items():
        ours = file.tensor(name)
        assert ours.shape == tensor.shape, name
        assert (ours - tensor).abs().max() <= (max(error, 0.01) if "embed" in name else error), name
    stored = file.blocks(PROJECTION)
    assert (stored.kind, stored.columns, stored.rows.dtype) == (kind, 64, torch.uint8)


def test_the_config_is_what_transformers_would_write(path: Path) -> None:
    config = llama(attention_bias=True).config
    for field, value in GgufFile(path).config.items():
        if field == "rope_theta":
            assert value == config.rope_parameters["rope_theta"]
        else:
            assert value == pytest.approx(getattr(config, field)), field


def test_a_cut_file_is_refused_wherever_it_is_cut(path: Path, tmp_path: Path) -> None:
    content, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 20, 100, 1000, 5000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(FlashSpecError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_a_damaged_header_is_refused_or_read_but_never_crashes(path: Path, tmp_path: Path) -> None:
    content, damaged = path.read_bytes(), tmp_path / "damaged.gguf"
    refused = 0
    for at in range(4, 400):
        damaged.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            GgufFile(damaged)
        except FlashSpecError:
            refused += 1
    assert refused > 50


def test_other_files_and_versions_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(FlashSpecError, match="begin with 'GGUF'"):
        GgufFile(other)
    other.write_bytes(b"GGUF\x01" + path.read_bytes()[5:])
    with pytest.raises(FlashSpecError, match="version 1 should be 2 or 3"):
        GgufFile(other)
    with pytest.raises(FlashSpecError, match="cannot be read"):
        GgufFile(tmp_path / "missing.gguf")


def test_a_missing_tensor_is_named(path: Path) -> None:
    with pytest.raises(FlashSpecError, match=r"blk\.9\.attn_norm\.weight"):
        GgufFile(path).tensor("model.layers.9.input_layernorm.weight")


def test_the_identity_follows_the_contents(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert GgufFile(copy).identity == GgufFile(path).identity
    copy.write_bytes(path.read_bytes() + b"\0")
    assert GgufFile(copy).identity != GgufFile(path).identity
