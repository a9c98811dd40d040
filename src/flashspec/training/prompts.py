"""What the target is asked: lines of a file, or questions that it thinks of itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flashspec.core import FlashSpecError
from flashspec.engine.prompts import read_prompts
from flashspec.models.tokenizer import Tokenizer
from flashspec.training.target import Target

Prompt = list[int]
Continue = Callable[[list[Prompt], int], list[Prompt]]  # (beginnings, most tokens) -> what the target adds, sampled
MOST_QUESTION_TOKENS = 96
BARREN = 20  # batches without a question, behind which there will be none
_MARK = "QUESTION-STANDS-HERE"
# Half of the questions begin with one of these: left alone, a small model asks about little else than essays.
_OPENINGS = (
    "Write a", "Write a Python function that", "How", "What is", "Why", "Explain", "Give me", "List", "Translate",
    "Rewrite", "Summarize", "Create a", "Compare", "Calculate", "Solve", "Describe", "Imagine", "Who", "Which",
    "Can you", "Is", "def", "from typing import List\n\n\ndef", "Classify", "Fix the", "Complete the", "Design",
    "Generate", "Given", "Suppose", "Find", "Edit", "Name", "In the", "Suggest", "If", "Act as", "Pretend you are",
    "Draft an email", "Compose", "Implement", "Develop a", "Extract", "Identify", "Provide", "Discuss", "Prove that",
    "Evaluate", "Tell me", "Help me", "Convert", "Choose", "Determine", "Construct", "A ", "The following", "Here is",
    "Please", "import", "class", "Arrange", "Analyze", "Recommend", "Predict", "Sort the", "Answer",
)  # fmt: skip


def file_prompts(path: Path, target: Target, longest: int) -> list[Prompt]:
    """What `read_prompts` finds, as a chat where the target has a template. Prompts of more than `longest` tokens are
    left out. FlashSpecError where fewer than two are left."""
    tokenizer = target.loaded.tokenizer
    if tokenizer is None:
        raise FlashSpecError(f"{target.loaded.name} has no tokenizer to read {path} with: leave --prompts out")
    encoded = [tokenizer.encode_question(text) for text in dict.fromkeys(read_prompts(path))]
    kept = [prompt for prompt in encoded if 0 < len(prompt) <= longest]
    if len(kept) < 2:
        raise FlashSpecError(
            f"prompts file {path} holds {len(kept)} different prompts of 1 to {longest} tokens; it takes two: "
            "one is kept for measuring"
        )
    return kept


def own_prompts(
    target: Target, write: Continue, rows: int, longest: int, seed: int, asked: Iterable[Prompt] = ()
) -> Iterator[list[Prompt]]:
    """Batches without end, some of them empty, of prompts that the target writes: questions in the place that its chat
    template has for the user, none of them twice or in `asked`, or, where there is no template, the beginnings of
    texts."""
    tokenizer = target.loaded.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        return _beginnings(target, write, rows, longest, random.Random(seed))
    seen = {tuple(prompt) for prompt in asked}
    return _questions(target, tokenizer, write, rows, longest, random.Random(seed), seen)


def _beginnings(
    target: Target, write: Continue, rows: int, longest: int, chance: random.Random
) -> Iterator[list[Prompt]]:
    tokenizer = target.loaded.tokenizer
    bos = tokenizer.special_tokens.get("bos_token") if tokenizer else None
    first = tokenizer.backend.token_to_id(bos) if tokenizer and bos else None
    special = tokenizer.special_ids if tokenizer else frozenset()
    words = [index for index in range(target.writable_ids) if index not in special]
    while True:
        starts = [[chance.choice(words)] if first is None else [first, chance.choice(words)] for _ in range(rows)]
        count = min(chance.choice((4, 8, 16, 32)), longest - 2)
        ends = set(target.loaded.eos_token_ids)
        written = write(starts, count)
        yield [
            start + [token for token in added if token not in ends]
            for start, added in zip(starts, written, strict=True)
        ]


def _questions(
    target: Target,
    tokenizer: Tokenizer,
    write: Continue,
    rows: int,
    longest: int,
    chance: random.Random,
    seen: set[tuple[int, ...]],
) -> Iterator[list[Prompt]]:
    rendered = tokenizer.render_chat([{"role": "user", "content": _MARK}])
    if rendered.count(_MARK) != 1:
        raise FlashSpecError(f"the chat template of {target.loaded.name} does not show a question once: give --prompts")
    before = rendered.partition(_MARK)[0]
    barren = 0
    while barren < BARREN:
        openings = [chance.choice(_OPENINGS) if chance.random() < 0.5 else "" for _ in range(rows)]
        starts = [tokenizer.encode(before + opening, add_special_tokens=False) for opening in openings]
        written = write(starts, MOST_QUESTION_TOKENS)
        prompts = []
        for opening, added in zip(openings, written, strict=True):
            question = (opening + tokenizer.decode(added)).strip()
            ended = bool(added) and added[-1] in target.loaded.eos_token_ids
            if not ended or not is_sane(question):
                continue
            prompt = tokenizer.encode_question(question)
            if len(prompt) <= longest and tuple(prompt) not in seen:
                seen.add(tuple(prompt))
                prompts.append(prompt)
        barren = 0 if prompts else barren + 1
        yield prompts
    raise FlashSpecError(f"{target.loaded.name} thinks of no question of its own: give it some with --prompts")


def is_sane(question: str) -> bool:
    """Some words, which are not the same one again and again, and no debris of characters."""
    words = question.split()
    printable = sum(char.isprintable() or char.isspace() for char in question)
    return (
        len(words) >= 3
        and len(set(words)) >= 0.4 * len(words)
        and "\ufffd" not in question
        and printable == len(question)
    )
