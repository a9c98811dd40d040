"""From a name to a model: Hugging Face id, folder of safetensors, GGUF file, or a loaded transformers model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flashspec.cache import cached_folder
from flashspec.config import check_device_name, default_device, gpu_fault
from flashspec.core import FlashSpecError, full_gpu_said
from flashspec.kernels import native_build
from flashspec.models import embedded
from flashspec.models.base import LanguageModel
from flashspec.models.checkpoint import (
    Checkpoint,
    SafetensorsFolder,
    StateDict,
    UnsupportedModel,
    decoder_config,
    decoder_weights,
    kind_of_head,
    read_json,
)
from flashspec.models.decoder import Decoder, DecoderConfig
from flashspec.models.embedded import Progress, silent
from flashspec.models.gguf import GgufFile
from flashspec.models.native import Matrices, NativeModel, fits, layout, pack, read_packed, write_packed
from flashspec.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = "smollm2"  # the embedded model
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """tokenizer: None where the source has none. config: the contents of its config.json."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    name: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Request:
    """How a model is wanted."""

    device: torch.device
    dtype: torch.dtype
    progress: Progress


@full_gpu_said()
def load_model(
    source: str | Path | PreTrainedModel,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
) -> LoadedModel:
    """The source's weights as a `LanguageModel`: the fast decoder for the Llama family, `HFModel` for the rest.

    device None: the GPU where there is one, or where a loaded model is. dtype auto: a loaded model's own, else bfloat16
    on a GPU and float32 on a CPU, where weights stay as they are stored if the native kernel is there.
    FlashSpecError says what is wrong with the source and what to do.
    """
    progress = progress or silent
    if device is not None:
        check_device(device)
    if not isinstance(source, str | Path):
        return _from_transformers(source, device, dtype, progress)
    place = torch.device(device or default_device())
    request = _Request(place, _dtype(dtype, torch.float32 if place.type == "cpu" else torch.bfloat16), progress)
    path = locate(source, progress)
    if path.is_dir():
        return _from_folder(path, str(source), request)
    return _from_gguf(path, request)


def check_device(device: str | torch.device) -> None:
    """ValueError where it is none, this machine does not have it, torch cannot use it, or it is not the first GPU."""
    device = str(device)
    check_device_name(device)
    if device == "cpu":
        return
    fault = gpu_fault()
    if fault:
        raise ValueError(f"device is {device!r}; {fault}")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        known = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        built = "" if torch.version.cuda or torch.version.hip else "; this build of torch knows no GPU"
        raise ValueError(f"device is {device!r}; this machine has {known}{built}")
    if index:  # kernels and events go to the current device of the thread that launches them
        raise ValueError(
            f"device is {device!r}; FlashSpec runs on the first GPU that it sees: "
            f"set CUDA_VISIBLE_DEVICES={index} and ask for 'cuda'"
        )


def locate(source: str | Path, progress: Progress = silent) -> Path:
    """A model folder or a GGUF file on this machine, fetched first where the source is an id."""
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise FlashSpecError(f"{path} is not a model: it should be a .gguf file or a folder with a config.json")
    if source == DEFAULT:
        return embedded.embedded_model(progress)
    if isinstance(source, Path) or path.suffix == ".gguf" or str(source)[:1] in "./~" or str(source).count("/") != 1:
        raise FlashSpecError(f"there is no model at {source}: give a folder, a .gguf file or a Hugging Face id")
    return _fetch(source, progress)


def _fetch(model_id: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"fetching {model_id}", None)
    try:
        folder = snapshot_download(model_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
    except (LocalEntryNotFoundError, ConnectionError):
        if model_id == embedded.HUB_ID:
            return embedded.embedded_model(progress)
        raise FlashSpecError(
            f"the Hugging Face hub cannot be reached, and {model_id} is not in its cache: "
            f"give a local folder or a .gguf file, or {DEFAULT!r} for the embedded model"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise FlashSpecError(f"the Hugging Face hub has no {model_id} for you: {_first_line(error)}") from None
    except OSError as error:
        raise FlashSpecError(f"cannot store {model_id} in the Hugging Face cache: {_first_line(error)}") from None
    return Path(folder)


def _dtype(dtype: str | torch.dtype, auto: torch.dtype) -> torch.dtype:
    if dtype == "auto":
        return auto
    for name, kind in _DTYPES.items():
        if dtype in (name, kind):
            return kind
    raise FlashSpecError(f"dtype {dtype!r} should be one of auto, {', '.join(_DTYPES)}")


def _decoder(config: DecoderConfig, checkpoint: Checkpoint, request: _Request) -> LanguageModel:
    request.progress("preparing the kernels", None)  # the native one is compiled at first use, for some seconds
    exact_on_cpu = request.device.type == "cpu" and request.dtype == torch.float32
    use_native = exact_on_cpu and fits(config) and native_build.available()
    request.progress("loading the weights", None)
    if use_native:
        matrices = _matrices(config, checkpoint, request.progress)
        try:
            return NativeModel(config, checkpoint, matrices)
        except ValueError as error:
            raise FlashSpecError(f"the weights have not the shapes that the model's config asks for: {error}") from None
    return Decoder(config, decoder_weights(config, checkpoint, request.device, request.dtype))


def _matrices(config: DecoderConfig, checkpoint: Checkpoint, progress: Progress) -> Matrices:
    """Packed for the native kernel; of a GGUF file once, as that takes most of a start."""
    if not isinstance(checkpoint, GgufFile):
        return pack(config, checkpoint)

    def convert(folder: Path) -> None:
        progress(f"packing the weights of {checkpoint.path.stem}", None)
        write_packed(folder, pack(config, checkpoint))

    return read_packed(cached_folder(f"gguf-{checkpoint.identity}-{layout()}", convert))


def _from_folder(folder: Path, name: str, request: _Request) -> LoadedModel:
    raw = read_json(folder / "config.json")
    try:
        model = _folder_model(folder, raw, request)
    except FlashSpecError:
        if kind_of_head(raw) is None:
            raise
        raise FlashSpecError(
            f"{name} is a head, no model: give it as a drafter (--drafter), beside its target"
        ) from None
    generation = folder / "generation_config.json"
    tokenizer = _folder_tokenizer(folder)
    eos = _eos_ids(raw, read_json(generation) if generation.exists() else {}, tokenizer)
    return LoadedModel(model, tokenizer, eos, name, raw)


def _folder_model(folder: Path, config: Mapping[str, Any], request: _Request) -> LanguageModel:
    try:
        return _decoder(decoder_config(config), SafetensorsFolder(folder), request)
    except UnsupportedModel as reason:
        return _hf_model(folder, reason, request)


def _from_gguf(path: Path, request: _Request) -> LoadedModel:
    file = GgufFile(path)
    try:
        config = decoder_config(file.config)
        if file.rotary_factors is not None:
            divided = zip(config.inv_freq, file.rotary_factors, strict=True)
            config = replace(config, inv_freq=tuple(frequency / factor for frequency, factor in divided))
        model = _decoder(config, file, request)
    except UnsupportedModel as reason:
        model = _hf_model(path, reason, request)
    tokenizer = _gguf_tokenizer(file, request.progress) if file.has_tokenizer else None
    return LoadedModel(model, tokenizer, _eos_ids(file.config, {}, tokenizer), path.stem, file.config)


def _from_transformers(
    source: PreTrainedModel, device: str | torch.device | None, dtype: str | torch.dtype, progress: Progress
) -> LoadedModel:
    from transformers import PreTrainedModel

    if not isinstance(source, PreTrainedModel):
        raise FlashSpecError(f"a model is a name, a path or a transformers model, not a {type(source).__name__}")
    request = _Request(torch.device(device or source.device), _dtype(dtype, source.dtype), progress)
    raw = source.config.to_dict()
    model: LanguageModel
    try:
        model = _decoder(decoder_config(raw), StateDict(source.state_dict()), request)
    except UnsupportedModel:
        from flashspec.models.hf import HFModel

        model = HFModel(source.to(request.device, request.dtype))
    folder = Path(source.name_or_path)
    tokenizer = _folder_tokenizer(folder) if source.name_or_path and folder.is_dir() else None
    eos = _eos_ids(raw, source.generation_config.to_dict() if source.generation_config else {}, tokenizer)
    return LoadedModel(model, tokenizer, eos, source.name_or_path or type(source).__name__, raw)


def _hf_model(path: Path, reason: UnsupportedModel, request: _Request) -> LanguageModel:
    """What the fast decoder cannot be, through transformers."""
    from flashspec.models.hf import HFModel

    try:
        return HFModel(_transformers_model(path, request.dtype).to(request.device))
    except FlashSpecError:
        raise
    except Exception as error:  # transformers raises almost anything for a model it cannot build
        raise FlashSpecError(
            f"{path} cannot be loaded: {reason}, and transformers says: {_first_line(error)}"
        ) from None


def _transformers_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    load: Callable[..., PreTrainedModel] = transformers.AutoModelForCausalLM.from_pretrained
    if path.is_dir():
        return load(path, dtype=dtype, use_safetensors=True, local_files_only=True).eval()
    # From 5.18 on weights stay packed unless this says otherwise; before, they never did.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    return load(path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, **options).eval()


def hf_reference(
    source: str | Path, dtype: torch.dtype = torch.float32, progress: Progress = silent
) -> PreTrainedModel:
    """The same weights as a plain transformers model on the CPU; a GGUF file is converted once, in float32."""
    path = locate(source, progress)
    if path.is_dir():
        return _transformers_model(path, dtype)
    file = GgufFile(path)
    if file.rotary_factors is not None:
        raise FlashSpecError(f"{path} scales its rotary frequencies in a way that transformers does not read")

    def convert(folder: Path) -> None:
        progress(f"converting {path.stem} for transformers", None)
        _transformers_model(path, torch.float32).save_pretrained(folder)

    return _transformers_model(cached_folder(f"gguf-{file.identity}-float32", convert), dtype)


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_folder(folder)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        _save_tokenizer(Path(scratch), folder)
        return Tokenizer.from_folder(Path(scratch))


def _gguf_tokenizer(file: GgufFile, progress: Progress) -> Tokenizer:
    """Read from the header by transformers, once."""

    def convert(folder: Path) -> None:
        progress(f"converting the tokenizer of {file.path.stem}", None)
        _save_tokenizer(folder, file.path.parent, gguf_file=file.path.name)

    return Tokenizer.from_folder(cached_folder(f"gguf-{file.identity}", convert))


def _save_tokenizer(target: Path, folder: Path, **options: str) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, **options).save_pretrained(target)
    except Exception as error:  # as above
        raise FlashSpecError(f"the tokenizer of {folder} cannot be converted: {_first_line(error)}") from None


def _eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """All that any of them names, each once."""
    named: list[Any] = [generation.get("eos_token_id"), config.get("eos_token_id")]
    named += [tokenizer.eos_token_id] if tokenizer else []
    listed = [ids if isinstance(ids, list) else [ids] for ids in named]
    return tuple(dict.fromkeys(id_ for ids in listed for id_ in ids if id_ is not None))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
