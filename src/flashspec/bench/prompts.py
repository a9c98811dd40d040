"""Benchmark prompts from local files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flashspec.core import FlashSpecError
from flashspec.engine.prompts import read_prompts


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A file's prompts, under its stem."""

    name: str
    prompts: tuple[str, ...]

    def spread(self, limit: int | None) -> PromptSet:
        """At most so many, evenly over all."""
        if limit is None or limit >= len(self.prompts):
            return self
        return replace(self, prompts=tuple(self.prompts[i * len(self.prompts) // limit] for i in range(limit)))


def load_prompts(path: Path, limit: int | None = None) -> PromptSet:
    """The prompts that `read_prompts` finds. A limit takes prompts spread evenly over the file, so that every category
    of it is seen."""
    prompts = read_prompts(path)
    if not prompts:
        raise FlashSpecError(f"prompts file {path} holds no prompt")
    return PromptSet(path.stem, tuple(prompts)).spread(limit)


SMALL = PromptSet(
    "built-in",
    (
        "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "Write a Python function that returns the n-th Fibonacci number, with a docstring and three examples.",
        "List ten tips for growing tomatoes, with one sentence on each.",
        "Rewrite this sentence in the past tense: The students walk to school and talk about the exam that they take.",
    ),
)
