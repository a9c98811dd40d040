"""Every measured number in the README is read from a result file: those of tables, and those of sentences, which are
the ones with a unit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import MarkovModel

from flashspec.bench.report import markdown
from flashspec.drafters import registry
from flashspec.engine import SpeculativeEngine

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
TABLES = re.compile(r"<!-- measured: (\S+) -->\n(.*?)<!-- /measured -->", re.DOTALL)
PROSE = " ".join(re.sub(r"```.*?```", "", TABLES.sub("", README), flags=re.DOTALL).split())
UNIT = r"(?:ns|µs|ms|s|seconds?|minutes?|%|×|x|times|tokens/s|tokens per second|[TG]B/s)(?![\w/])"
NUMBER = re.compile(r"(?<![\w.:-])\d[\d,.]*\s?" + UNIT)
Row = dict[str, Any]


def rows(file: str, **wanted: Any) -> list[Row]:
    found: list[Row] = json.loads((ROOT / "benchmarks" / "results" / file).read_text("utf-8"))["rows"]
    return [row for row in found if all(row.get(name) == value for name, value in wanted.items())]


def the(file: str, figure: str, **wanted: Any) -> float:
    """Of the first such row."""
    return float(rows(file, **wanted)[0][figure])


def span(file: str, figure: str, **wanted: Any) -> list[float]:
    """The least and the most of such rows."""
    figures = [row[figure] for row in rows(file, **wanted) if row.get(figure) is not None]
    return [min(figures), max(figures)]


STEPS, START = "steps-8b-h200.json", "start-8b-h200.json"
SHORT, SHORT_SAMPLED = "transformers-135m-h200.json", "transformers-135m-t07-h200.json"
MIX = "plain, ngram:4, suffix:15"
WIDENED = "8B-shaped (widened SmolLM2-135M)"
OURS = {"part": "forward", "method": "flashspec"}
THREE, FIVE = (" / ".join(count * [r"([\d.]+)"]) for count in (3, 5))


def over_plain(file: str, method: str) -> list[float]:
    """Over plain decoding of as many rows."""
    return [row["speedup_vs_plain"] for row in rows(file, method=method)]


def same_texts(method: str) -> list[float]:
    """Per cent that are plain decoding's, the least and the most of batches of several rows."""
    several = [row for row in rows("batches-8b-h200.json", method=method) if row["batch_size"] > 1]
    shares = [100 * row["same_text_as_plain"] for row in several]
    return [min(shares), max(shares)]


def by_set(file: str, method: str) -> list[float]:
    return [row["acceptance_length"] for row in rows(file, method=method)]


CLAIMS: list[tuple[str, Callable[[], list[float]]]] = [  # a sentence's numbers in brackets, and what they should be
    (r"a plain step takes ([\d.]+) ms", lambda: [the(STEPS, "microseconds", part="step", arm="plain") / 1e3]),
    (r"its forward at ([\d.]+) of the memory's speed", lambda: [the(STEPS, "mbu", width=1, **OURS)]),
    (
        r"checks eight draft tokens takes ([\d.]+) % more",
        lambda: [100 * (the(STEPS, "over_plain", width=9, **OURS) - 1)],
    ),
    (r"neither target nor drafter ([\d.]+) to ([\d.]+) µs", lambda: span(STEPS, "rest_microseconds", part="step")),
    (r"first token comes ([\d.]+) s after", lambda: [the(START, "first_token_seconds", caches="cold")]),
    (
        r"compiled, with EAGLE-3 ([\d.]+) s,",
        lambda: [the(START, "first_token_seconds", drafters="suffix,eagle3", caches="cold")],
    ),
    (r"and ([\d.]+) s later on", lambda: span(START, "first_token_seconds", caches="warm")[1:]),
    (
        r"At temperature 0.7 `eagle3:4` yields ([\d.]+) to ([\d.]+) times plain",
        lambda: span("heads-8b-t07-h200.json", "speedup_vs_plain", method="eagle3:4"),
    ),
    (rf"heads yield {THREE} tokens a forward \(`eagle3:4`\)", lambda: by_set("accepted-135m-h200.json", "eagle3:4")),
    (rf"and {THREE} \(`medusa:4`\)", lambda: by_set("accepted-135m-h200.json", "medusa:4")),
    (rf"at temperature 0.7 {THREE} and", lambda: by_set("accepted-135m-t07-h200.json", "eagle3:4")),
    (rf"and {THREE} \(`accepted-135m-h200", lambda: by_set("accepted-135m-t07-h200.json", "medusa:4")),
    (r"([\d.]+) to ([\d.]+) % of the texts of `ngram:4` are plain decoding's", lambda: same_texts("ngram:4")),
    (rf"`auto` {FIVE} times plain\s+decoding, `ngram:4`", lambda: over_plain("batches-8b-h200.json", "auto")),
    (rf"decoding, `ngram:4` {FIVE} \(`batches", lambda: over_plain("batches-8b-h200.json", "ngram:4")),
    (rf"`auto` {THREE} times plain\s+decoding, `ngram:4`", lambda: over_plain("text-135m-t07-h200.json", "auto")),
    (rf"decoding, `ngram:4` {THREE} \(`text", lambda: over_plain("text-135m-t07-h200.json", "ngram:4")),
    (
        r"idle for ([\d.]+) µs,",
        lambda: [round(the("gaps-h200.json", "idle_microseconds", arms="suffix:15", target=WIDENED), -1)],
    ),
    (
        r"for ([\d.]+) on average \(`gaps",
        lambda: [round(the("gaps-h200.json", "idle_microseconds", arms=MIX, target=WIDENED), -1)],
    ),
    (rf"to find that out: {THREE},", lambda: over_plain(SHORT_SAMPLED, "auto@arms")),
    (rf"where `ngram:4` had {THREE} \(`transformers-135m-t07", lambda: over_plain(SHORT_SAMPLED, "ngram:4")),
    (rf"and greedy {THREE},", lambda: over_plain(SHORT, "auto@arms")),
    (rf"where `ngram:4` had {THREE} \(`transformers-135m-h200", lambda: over_plain(SHORT, "ngram:4")),
]


def wrong(prose: str, claim: str, expected: list[float]) -> list[str]:
    """What a sentence says, and should, as far as its digits go; a claim that is not made is wrong too."""
    found = re.search(claim, prose)
    if found is None:
        return [f"no sentence has {claim!r}: change or remove it here"]
    should = [f"{value:.{len(said.partition('.')[2])}f}" for said, value in zip(found.groups(), expected, strict=True)]
    return [f"{found[0]!r}: should be {' and '.join(should)}"] if list(found.groups()) != should else []


def unread(prose: str, claims: list[str]) -> list[str]:
    """Numbers with a unit that no claim covers."""
    covered = [found.span() for claim in claims for found in re.finditer(claim, prose)]
    return [found[0] for found in NUMBER.finditer(prose) if not any(a <= found.start() < b for a, b in covered)]


def test_measured_tables_are_those_of_the_result_files() -> None:
    blocks = TABLES.findall(README)
    assert blocks
    for path, content in blocks:
        assert content.strip() == markdown(json.loads((ROOT / path).read_text("utf-8")))


@pytest.mark.parametrize("claim, expected", CLAIMS, ids=[claim for claim, _ in CLAIMS])
def test_a_sentences_numbers_are_those_of_the_result_files(claim: str, expected: Callable[[], list[float]]) -> None:
    assert wrong(PROSE, claim, expected()) == []


def test_no_other_sentence_has_a_measured_number() -> None:
    assert unread(PROSE, [claim for claim, _ in CLAIMS]) == []


def test_the_drafter_of_the_snippet_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    (snippet,) = re.findall(r"```python\n([^`]*@register[^`]*)```", README)
    target, made = MarkovModel.random(6, seed=3), []

    def on_a_small_model(name: str, drafters: list[str]) -> None:
        made.append(SpeculativeEngine({"device": "cpu"}, drafters, target, arms="mine:3"))

    monkeypatch.setattr(SpeculativeEngine, "from_pretrained", on_a_small_model)
    exec(snippet, {})
    target.table[:, 2] = 9.0 * torch.eye(6)[2]  # behind a 2 there is no other token
    result = made[0].generate([[2]], 12, temperature=1.0, seed=1)
    assert result.output_ids.tolist() == [[2] * 12] and result.acceptance_rate == 1.0


def test_bit_for_bit_is_what_it_says() -> None:
    if "bit for bit" in PROSE:
        found = rows("heads-8b-h200.json") + rows("heads-135m-h200.json")
        assert {row["same_text_as_plain"] for row in found} == {1.0}


def test_a_wrong_number_is_seen() -> None:
    prose, claim = (
        "It takes 4.1 to 5 ms, and 3 % of 12 prompts at temperature 0.7 gain 2.0x.",
        r"takes ([\d.]+) to ([\d.]+)",
    )
    assert wrong(prose, claim, [4.12, 4.7]) == []
    assert wrong(prose, claim, [4.2, 4.7]) == ["'takes 4.1 to 5': should be 4.2 and 5"]
    assert wrong(prose, "gives (.*)", [1.0]) == ["no sentence has 'gives (.*)': change or remove it here"]
    assert unread(prose, [claim]) == ["3 %", "2.0x"]
