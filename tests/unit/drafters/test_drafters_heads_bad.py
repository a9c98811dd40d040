"""Heads that do not fit, or are not whole: one clear sentence each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from decoding import Reciter
from safetensors.torch import load_file, save_file
from small_heads import HIDDEN, LAYERS, PART, VOCAB, write_eagle, write_medusa, write_tiny
from small_models import llama, randomised

from flashspec.core import FlashSpecError
from flashspec.drafters.heads import eagle_layers, is_head, likeness, load_head, target_hash
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.hf import HFModel
from flashspec.models.loading import load_model
from flashspec.models.native import NativeModel, pack


def target_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    model = llama(**{"vocab_size": VOCAB, "num_hidden_layers": LAYERS, **changes})
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return Decoder(config, decoder_weights(config, state, torch.device("cpu"), dtype))


def names_of(target: Decoder) -> dict[str, str]:
    sample = target.sample()
    return {"target_hash": target_hash(sample), "target_hash_float16": target_hash(sample, torch.float16)}


def gemma() -> tf.PreTrainedModel:
    """A model that runs through transformers."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": VOCAB}
    return randomised(tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes)))


def changed(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The same head with other tensors; None: without it."""
    path = next(folder.glob("*.safetensors"))
    kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(kept, path)
    return folder


def refused(folder: Path, says: str, target: Any = None) -> None:
    with pytest.raises(FlashSpecError, match=says):
        load_head(folder, target or target_of(), "head")


def test_another_targets_head(tmp_path: Path) -> None:
    head = write_eagle(tmp_path)
    refused(head, "its vocab_size is 40 and the target's 50", target_of(vocab_size=50))
    refused(head, "fc.weight has shape .64, 192., but the model's config asks for .64, 96.", target_of(hidden_size=32))
    head = write_eagle(tmp_path, target_hidden_size=128)
    refused(head, "its target_hidden_size is 128 and the target's 64")
    names = {"target_hash": "0" * 16 + "-" + "1" * 16, "target_hash_float16": "2" * 16 + "-" + "3" * 16}
    head = write_eagle(tmp_path, flashspec={"kind": "eagle3", "target": "some/model", **names})
    for target in (target_of(), target_of(torch.bfloat16), target_of(torch.float16), HFModel(gemma())):
        refused(head, "trained for the weights of some/model", target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_revisions_head_drafts_with_a_warning(tmp_path: Path, dtype: torch.dtype) -> None:
    marks = {"kind": "eagle3", "target": "some/model", "revision": "abc", **names_of(target_of())}
    head = write_eagle(tmp_path, flashspec=marks)
    revision = target_of(dtype)
    revision.weights.layers[-1].output[3, 5] += 0.1
    says = r"was trained for some/model, revision abc, weights .*-.*, and this target has others, weights"
    with pytest.warns(RuntimeWarning, match=says):
        assert load_head(head, revision, "head").name == "head"


def noisy(target: Decoder, noise: float) -> Decoder:
    """Every weight a little different, as a quantisation or a full fine-tune leaves them."""
    generator = torch.Generator().manual_seed(1)
    layers = [each for layer in target.weights.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    for weight in (target.weights.embedding, *layers):
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_quantisations_head_drafts_with_a_warning(tmp_path: Path, dtype: torch.dtype) -> None:
    near = likeness(target_of().sample())
    marks = {"kind": "eagle3", "target": "some/model", "revision": "abc", "target_likeness": near}
    head = write_eagle(tmp_path, flashspec={**marks, **names_of(target_of())})
    with pytest.warns(RuntimeWarning, match=r"was trained for some/model, .* fewer drafts may be accepted"):
        assert load_head(head, noisy(target_of(dtype), 0.2), "head").name == "head"
    refused(head, "trained for the weights of some/model", noisy(target_of(dtype), 20.0))
    head = write_eagle(tmp_path, flashspec={**marks, "target_hash": "0-1", "target_hash_float16": None})
    if dtype == torch.float16:  # trained where its hash could not be known
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for each in (head, write_eagle(tmp_path / "old", flashspec={"kind": "eagle3", "target_hash": "0-1"})):
                load_head(each, target_of(dtype), "head")
        refused(head, "trained for the weights of some/model", noisy(target_of(dtype), 20.0))


def test_the_targets_own_head_fits_in_any_precision(tmp_path: Path) -> None:
    model = llama(VOCAB, num_hidden_layers=LAYERS)
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    marks = {"kind": "eagle3", "target": "t", **names_of(target_of()), "feature_layers": [1, 2, 3]}
    decoders = [target_of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for target in (*decoders, NativeModel(config, state, pack(config, state)), HFModel(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            head = load_head(write_eagle(tmp_path, flashspec=marks), target, "head").head  # type: ignore[attr-defined]
        assert head.dtype == target.dtype and head.fusion.layers == (2, 3, 4)


def test_what_a_map_may_not_say(tmp_path: Path) -> None:
    offsets = torch.tensor(PART) - torch.arange(len(PART))
    far = offsets.clone()
    far[-1] = 100
    twice = offsets.clone()
    twice[1] = twice[0] - 1
    for wrong in (far, twice):
        refused(changed(write_eagle(tmp_path), d2t=wrong), "d2t names a token twice, or one outside")
    refused(changed(write_eagle(tmp_path), d2t=offsets[:-1]), "it maps 23 of 40 tokens, but its config says 24")
    refused(changed(write_eagle(tmp_path), t2d=torch.zeros(39).bool()), "it maps 24 of 39 tokens")


def test_what_is_missing_or_cut_short(tmp_path: Path) -> None:
    refused(changed(write_eagle(tmp_path), **{"norm.weight": None}), "hold no tensor 'norm.weight'")
    refused(changed(write_eagle(tmp_path), **{"fc.weight": torch.zeros(HIDDEN, HIDDEN)}), "fc.weight has shape")
    head = write_eagle(tmp_path)
    data = (head / "model.safetensors").read_bytes()
    (head / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(head, "is damaged or cut short")
    (head / "model.safetensors").unlink()
    (head / "pytorch_model.bin").write_bytes(b"x")
    refused(head, "has no model.safetensors; a pytorch_model.bin is never loaded, as .*: convert it with safetensors")
    head = write_medusa(tmp_path / "pickled")
    (head / "medusa_lm_head.safetensors").rename(head / "medusa_lm_head.pt")
    refused(
        head, r"has no medusa_lm_head.safetensors; a medusa_lm_head.pt is never .*load\('medusa_lm_head.pt', weights"
    )
    refused(write_tiny(tmp_path / "tiny", hidden_size=32), "it has no embedding of its own, and its hidden_size is 32")
    wrong = changed(write_medusa(tmp_path / "beside", beside=True), **{"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)})
    refused(wrong, "fc.weight has shape .64, 192., but the model's config asks for .64, 320.")
    refused(write_medusa(tmp_path / "none", medusa_num_heads=0), "medusa_num_heads is 0")
    refused(write_medusa(tmp_path / "more", medusa_num_heads=5), "hold no tensor '4.0.linear.weight'")


def test_what_is_not_known(tmp_path: Path) -> None:
    refused(write_eagle(tmp_path, flashspec={"kind": "hydra"}), "a head of kind 'hydra'; the known ones are eagle3")
    marks = {"kind": "eagle3", "feature_layers": [0, 1, LAYERS - 1]}
    refused(
        write_eagle(tmp_path, flashspec=marks), r"it reads what enters layers \[1, 2, 7\], and the target's last is 6"
    )
    refused(write_eagle(tmp_path), "needs its target's embedding; a Reciter has none", Reciter([1], VOCAB))


@pytest.mark.parametrize(
    ("named", "layers"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}}, (1, 4, 6)),
        ({"eagle_aux_hidden_state_layer_ids": [0, 3, 5]}, (0, 3, 5)),
        ({"eagle_config": None}, eagle_layers(LAYERS)),
    ],
)
def test_public_heads_name_the_layers_that_they_read(tmp_path: Path, named: dict, layers: tuple[int, ...]) -> None:
    assert load_head(write_eagle(tmp_path, **named), target_of(), "head").feature_layers == layers


def test_a_layer_of_another_form_is_refused(tmp_path: Path) -> None:
    load_head(write_eagle(tmp_path, norm_before_residual=False), target_of(), "head")
    for told in ({"norm_before_fc": True}, {"eagle_config": {"norm_before_fc": True}}):
        with pytest.raises(FlashSpecError, match="has norm_before_fc, which FlashSpec does not know to compute"):
            load_head(write_eagle(tmp_path, **told), target_of(), "head")


def test_which_folders_are_heads(tmp_path: Path) -> None:
    assert is_head(write_eagle(tmp_path / "a")) and is_head(str(write_medusa(tmp_path / "b")))
    assert is_head(write_eagle(tmp_path / "c", None, architectures=["LlamaForCausalLMEagle3"]))
    assert not is_head("ngram") and not is_head(tmp_path) and not is_head(None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": None}))
    assert not is_head(tmp_path)


def test_layers_of_shallow_targets_coincide() -> None:
    assert [eagle_layers(count) for count in (32, 30, 6, 3, 2)] == [
        (2, 16, 29),
        (2, 15, 27),
        (2, 3, 3),
        (2, 1, 1),
        (1, 1, 1),
    ]


@pytest.mark.parametrize("write", [write_eagle, write_medusa, write_tiny])
def test_a_head_is_no_target(tmp_path: Path, write: Any) -> None:
    with pytest.raises(FlashSpecError, match=r"is a head, no model: give it as a drafter \(--drafter\)"):
        load_model(write(tmp_path), device="cpu")
