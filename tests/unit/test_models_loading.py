"""From a name to a model: every kind of source gives transformers' logits, every bad one gives a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as tf
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from small_models import byte_level, llama, randomised, wrapped, write_gguf
from torch import Tensor

from flashspec.cache import cache_dir
from flashspec.core import FlashSpecError
from flashspec.kernels import native_build
from flashspec.models import embedded
from flashspec.models.decoder import Decoder
from flashspec.models.hf import HFModel
from flashspec.models.loading import LoadedModel, hf_reference, load_model
from flashspec.models.native import NativeModel

IDS = torch.randint(3, 320, (1, 12), generator=torch.Generator().manual_seed(0))
SMALL_GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built kernels stay where they are; what loading converts goes to a folder of the test's own."""
    native_build.available()
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    if request.param == "torch":
        monkeypatch.setattr(native_build, "available", lambda: False)
        return Decoder
    if not native_build.available():
        pytest.skip(native_build.why_not())
    return NativeModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    llama().save_pretrained(path)
    wrapped(byte_level()).save_pretrained(path)
    return path


def logits(loaded: LoadedModel) -> Tensor:
    model, count = loaded.model, IDS.shape[1]
    ids, positions = IDS.to(model.device), torch.arange(count, device=model.device)[None]
    return model.logits(model.forward(ids, positions, model.new_cache(1, count), count))


def assert_same(loaded: LoadedModel, reference: tf.PreTrainedModel) -> None:
    torch.testing.assert_close(logits(loaded), reference(IDS).logits.float(), atol=1e-4, rtol=0.0)


def test_a_folder(folder: Path, backend: type) -> None:
    tasks: list[str] = []
    loaded = load_model(folder, device="cpu", progress=lambda task, _: tasks.append(task))
    assert isinstance(loaded.model, backend)
    assert_same(loaded, llama())
    assert loaded.tokenizer is not None and loaded.tokenizer.decode(loaded.tokenizer.encode("the rose")) == "the rose"
    assert (loaded.eos_token_ids, loaded.name, loaded.config["model_type"]) == ((2,), str(folder), "llama")
    assert tasks == ["preparing the kernels", "loading the weights"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_lose_nothing_in_float32(tmp_path: Path, backend: type, dtype: torch.dtype) -> None:
    llama().to(dtype).save_pretrained(tmp_path / "half")
    assert_same(load_model(tmp_path / "half", device="cpu"), hf_reference(tmp_path / "half"))


def test_a_folder_in_shards(tmp_path: Path, backend: type) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert not (tmp_path / "shards/model.safetensors").exists()
    loaded = load_model(str(tmp_path / "shards"), device="cpu")
    assert loaded.tokenizer is None
    assert_same(loaded, llama())


def test_a_dtype_that_is_asked_for(folder: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_model(folder, device="cpu", dtype=dtype).model.dtype == torch.bfloat16
    for dtype in ("int8", torch.float64):
        with pytest.raises(FlashSpecError, match="dtype"):
            load_model(folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_gguf_file(tmp_path: Path, backend: type, kind: str) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama(tie_word_embeddings=True), kind)
    loaded = load_model(path, device="cpu")
    assert isinstance(loaded.model, backend)
    assert_same(loaded, hf_reference(path))
    assert (loaded.eos_token_ids, loaded.name) == ((2,), "small")


def test_a_gguf_file_of_another_family(tmp_path: Path, backend: type) -> None:
    shape = {field: getattr(llama().config, field) for field in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = randomised(tf.Qwen2ForCausalLM(tf.Qwen2Config(**shape, **heads, max_position_embeddings=64)))
    path = write_gguf(tmp_path / "qwen.gguf", model, "F32")
    torch.testing.assert_close(logits(load_model(path, device="cpu")), model(IDS).logits, atol=0.05, rtol=0.0)
    assert_same(load_model(path, device="cpu"), hf_reference(path))


def test_llama_3_scaling_in_a_gguf_file(tmp_path: Path, backend: type) -> None:
    stretched = llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    with torch.no_grad():  # write_gguf stores it in 8 bits
        stretched.model.embed_tokens.weight.copy_(
            hf_reference(write_gguf(tmp_path / "a.gguf", llama())).model.embed_tokens.weight
        )
    path = write_gguf(tmp_path / "b.gguf", llama(), factors=[4.0] * 8)
    assert_same(load_model(path, device="cpu"), stretched)
    with pytest.raises(FlashSpecError, match="rotary"):
        hf_reference(path)


def test_a_gguf_tokenizer_is_transformers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama())
    ours, theirs = load_model(path, device="cpu").tokenizer, wrapped(byte_level())
    chat = [{"role": "user", "content": "the quick 12 🦊"}]
    assert ours is not None
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )


def test_what_was_converted_is_used_again_unless_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama(), "Q4_1")
    first, tasks = logits(load_model(path, device="cpu")), []

    def load() -> None:
        tasks.clear()
        torch.testing.assert_close(
            logits(load_model(path, device="cpu", progress=lambda task, _: tasks.append(task))), first
        )

    load()
    assert tasks == ["preparing the kernels", "loading the weights"]
    for file in [file for file in cache_dir().rglob("*") if file.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        load()
        assert len(tasks) == 3, file
    for file in (cache_dir() / "models").iterdir():
        shutil.rmtree(file)
    load()
    assert len(tasks) == (4 if native_build.available() else 3)


def test_a_loaded_transformers_model(folder: Path, backend: type) -> None:
    loaded = load_model(tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert isinstance(loaded.model, backend)
    assert_same(loaded, llama())
    assert loaded.tokenizer is not None and loaded.eos_token_ids == (2,)
    bare = load_model(llama())
    assert (bare.tokenizer, bare.name) == (None, "LlamaForCausalLM")


def test_other_architectures_go_through_transformers(tmp_path: Path) -> None:
    model = randomised(tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL_GPT)))
    model.save_pretrained(tmp_path / "gpt2")
    for source in (tmp_path / "gpt2", model):
        loaded = load_model(source, device="cpu")
        assert isinstance(loaded.model, HFModel)
        assert_same(loaded, model)


def test_a_tokenizer_without_tokenizer_json_is_converted(folder: Path) -> None:
    backend = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(backend["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["model"]["merges"]))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_model(folder, device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("the rose") == wrapped(byte_level()).encode("the rose")
    (folder / "vocab.json").write_text("{")
    with pytest.raises(FlashSpecError, match="tokenizer of"):
        load_model(folder, device="cpu")


def test_every_end_of_text_token_counts(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert load_model(folder, device="cpu").eos_token_ids == (5, 2)


def test_the_fast_path_imports_no_transformers(folder: Path) -> None:
    code = f"""
import sys
from flashspec.models.loading import load_model
loaded = load_model({str(folder)!r}, device="cpu", dtype="bfloat16")
loaded.tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])
sys.exit("transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "no JSON": (lambda f: cut(f / "config.json", 40), r"config\.json cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "should hold a JSON object"),
    "a field missing": (lambda f: edit_config(f, intermediate_size=None), "no field 'intermediate_size'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors$"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "never loaded"),
    "cut weights": (lambda f: cut(f / "model.safetensors", 100_000), "damaged or cut short"),
    "a cut header": (lambda f: cut(f / "model.safetensors", 20), "damaged or cut short"),
    "another shape": (lambda f: edit_config(f, intermediate_size=100), r"has shape \(.*config asks for"),
    "a tensor missing": (lambda f: edit_config(f, num_hidden_layers=3), "hold no tensor 'model.layers.2"),
    "an unknown architecture": (lambda f: edit_config(f, model_type="novel"), "'novel'.*transformers says"),
    "code of its own": (
        lambda f: edit_config(f, model_type="x", auto_map={"AutoConfig": "x.X"}),
        "'x'.*transformers says",
    ),
}


@pytest.mark.parametrize("case", list(BAD_FOLDERS))
def test_a_bad_folder_is_one_sentence(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "available", lambda: False)
    change, message = BAD_FOLDERS[case]
    change(folder)
    with pytest.raises(FlashSpecError, match=message) as raised:
        load_model(folder, device="cpu")
    assert "\n" not in str(raised.value)


def test_shapes_are_checked_before_the_native_kernel_sees_them(folder: Path) -> None:
    edit_config(folder, intermediate_size=100)
    with pytest.raises(FlashSpecError, match=r"gate should be \(100, 64\): got \(96, 64\)"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no model at"),
        ("/nowhere/at/all", "no model at"),
        ("nowhere.gguf", "no model at"),
        ("no-owner", "no model at"),
        (Path("owner/name"), "no model at"),
        (__file__, "should be a .gguf file or a folder"),
        (7, "not a int"),
    ],
)
def test_a_bad_source_is_one_sentence(source: object, message: str) -> None:
    with pytest.raises(FlashSpecError, match=message):
        load_model(source)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no connection"), r"cannot be reached.*'smollm2'"),
        (ConnectionError("refused"), r"cannot be reached.*'smollm2'"),
        (
            HFValidationError("404: no such model\nmore"),
            "has no owner/name for you: 404",
        ),
        (OSError(28, "No space left on device"), "cannot store owner/name"),
    ],
)
def test_a_hub_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FlashSpecError, match=message):
        load_model("owner/name")


def test_the_default_stands_in_for_its_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "default.gguf", llama())
    monkeypatch.setattr(embedded, "embedded_model", lambda progress: path)
    assert load_model("smollm2", device="cpu").name == "default"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert load_model(embedded.HUB_ID, device="cpu").name == embedded.HUB_ID

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert load_model(embedded.HUB_ID, device="cpu").name == "default"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama())
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(FlashSpecError, match="cannot write to the cache"):
        load_model(path, device="cpu")


def test_a_reference_of_a_folder(folder: Path) -> None:
    model = hf_reference(folder, torch.bfloat16)
    assert isinstance(model, tf.LlamaForCausalLM) and model.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "mps", torch.device("meta")])
def test_a_device_that_is_none_is_refused_in_one_sentence(device: str | torch.device) -> None:
    with pytest.raises(ValueError, match="it should be 'cpu', 'cuda' or 'cuda:N'"):
        load_model("smollm2", device=device)
