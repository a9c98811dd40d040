"""What a caller may pass as a prompt, as rows of token ids; prompts from files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.models.base import LanguageModel
from flashspec.models.tokenizer import Tokenizer

Message = Mapping[str, str]
Kind = str | Sequence[Message] | Sequence[int]
Prompt = Kind | Sequence[str] | Sequence[Sequence[Message]] | Sequence[Sequence[int]] | Tensor
_EXPECTED = "prompt should be text, messages with 'role' and 'content', token ids, or a list of one of these kinds"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def encode_prompts(prompt: Prompt, tokenizer: Tokenizer | None, model: LanguageModel) -> list[list[int]]:
    """Text, a chat, or token ids (T,); a list of any of them, or a tensor (B, T); -1 pads ids. ValueError names what is
    wrong."""
    rows = _token_rows(prompt, tokenizer)
    if not rows:
        raise ValueError("prompt is empty; give text, messages or token ids")
    for row, token_ids in enumerate(rows):
        if not token_ids:
            raise ValueError(f"prompt {row} is empty; give at least one token")
        if not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size:
            raise ValueError(f"prompt {row} holds ids outside 0..{model.vocab_size - 1}")
        if len(token_ids) >= model.max_context:
            raise ValueError(
                f"prompt {row} has {len(token_ids)} tokens; the target's context of {model.max_context} "
                "must leave room for at least one more"
            )
    return rows


def _token_rows(prompt: Prompt, tokenizer: Tokenizer | None) -> list[list[int]]:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2 or prompt.dtype not in _INTEGERS:
            raise ValueError(
                f"prompt is a {prompt.dtype} tensor of shape {tuple(prompt.shape)}; it should be int64 (B, T)"
            )
        return [[token_id for token_id in row if token_id != -1] for row in prompt.tolist()]
    opened = _opened(prompt)
    if not isinstance(opened, str | list):
        raise ValueError(_EXPECTED)
    items: list[Any] = [opened] if isinstance(opened, str) else [_opened(item) for item in opened]
    if items and _are_ids(items):
        items = [items]
    if all(isinstance(item, list) and _are_ids(item) for item in items):
        return [[int(token_id) for token_id in row if token_id != -1] for row in items]
    texts = all(isinstance(item, str) for item in items)
    chats = [items] if _is_chat(items) else items
    if not texts and not all(map(_is_chat, chats)):
        raise ValueError(_EXPECTED)
    if tokenizer is None:
        raise ValueError("prompt is text, but this engine has no tokenizer: pass token ids")
    return [tokenizer.encode(item) for item in items] if texts else [*map(tokenizer.apply_chat_template, chats)]


def _opened(item: Any) -> Any:
    """A list of what it holds; itself where that is nothing, or is neither messages, texts nor ids."""
    closed = not isinstance(item, Iterable) or isinstance(item, str | bytes | bytearray | memoryview | Mapping | Tensor)
    return item if closed else list(item)


def _are_ids(items: list[Any]) -> bool:
    kinds = set(map(type, items))
    return bool not in kinds and all(issubclass(kind, Integral) for kind in kinds)


def _is_chat(items: Any) -> bool:
    messages = items if isinstance(items, list) else []
    return bool(messages) and all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in messages)


def read_prompts(path: Path) -> list[str]:
    """A file's prompts: JSON lines with `turns` (the first is taken) or `prompt`; anything else is one prompt a line.
    FlashSpecError where it cannot be read."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FlashSpecError(f"prompts file {path} cannot be read: {error}") from None
    return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        document = json.loads(line)
        return str(document["turns"][0] if "turns" in document else document["prompt"])
    except (ValueError, LookupError, TypeError):
        raise FlashSpecError(f"{where} should be a JSON object with 'turns' or 'prompt'") from None
