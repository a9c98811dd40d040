"""Benchmark prompts from local files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flashspec.core import FlashSpecError


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A file's prompts, under its stem."""

    name: str
    prompts: tuple[str, ...]


def load_prompts(path: Path, limit: int | None = None) -> PromptSet:
    """JSON lines with `turns` (the first is taken) or `prompt`; anything else is one prompt a line. A limit takes
    prompts spread evenly over the file, so that every category of it is seen."""
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FlashSpecError(f"prompts file {path} cannot be read: {error}") from None
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not prompts:
        raise FlashSpecError(f"prompts file {path} holds no prompt")
    if limit is not None and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return PromptSet(path.stem, tuple(prompts))


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        document = json.loads(line)
        return str(document["turns"][0] if "turns" in document else document["prompt"])
    except (ValueError, LookupError, TypeError):
        raise FlashSpecError(f"{where} should be a JSON object with 'turns' or 'prompt'") from None


SMALL = PromptSet(
    "built-in",
    (
        "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "Write a Python function that returns the n-th Fibonacci number, with a docstring and three examples.",
        "List ten tips for growing tomatoes, with one sentence on each.",
        "Rewrite this sentence in the past tense: The students walk to school and talk about the exam that they take.",
    ),
)
