"""What a caller may pass as a prompt, as rows of token ids; prompts from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.models.base import LanguageModel
from flashspec.models.tokenizer import Tokenizer

Message = Mapping[str, str]
Prompt = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[int]] | Tensor


def encode_prompts(prompt: Prompt, tokenizer: Tokenizer | None, model: LanguageModel) -> list[list[int]]:
    """Text, a list of texts, a chat, or token ids, one row or (B, T) padded with -1. ValueError names what is wrong."""
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
        if prompt.dim() != 2 or prompt.is_floating_point():
            raise ValueError(
                f"prompt is a {prompt.dtype} tensor of shape {tuple(prompt.shape)}; it should be int64 (B, T)"
            )
        return [[token_id for token_id in row if token_id != -1] for row in prompt.tolist()]
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if items and all(isinstance(item, int) for item in items):
        items = [items]
    if all(isinstance(item, Sequence) and not isinstance(item, str) for item in items):
        return [[int(token_id) for token_id in row if token_id != -1] for row in items]
    if tokenizer is None:
        raise ValueError("prompt is text, but this engine has no tokenizer: pass token ids")
    if all(isinstance(item, str) for item in items):
        return [tokenizer.encode(item) for item in items]
    if all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in items):
        return [tokenizer.apply_chat_template(items)]
    raise ValueError("prompt should be text, a list of texts, messages with 'role' and 'content', or token ids")


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
