"""`flashspec generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from flashspec.cli.options import EngineOptions, engine_options
from flashspec.cli.report import arms_table, compare, comparison_line, document, summary
from flashspec.cli.terminal import Waiting, complain, stderr, write

if TYPE_CHECKING:
    from flashspec.core import GenerationResult
    from flashspec.engine import SpeculativeEngine
    from flashspec.engine.prompts import Prompt


@click.command()
@click.argument("prompt", default="-")
@click.option("--system", help="What the model is told ahead of the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@click.option("--compare", "comparing", is_flag=True, help="Measure plain decoding of the same prompt afterwards.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else.")
@click.option("--logprobs", type=int, help="With --json: each token's log-probability, and so many likely others.")
@engine_options
def generate(
    prompt: str,
    system: str | None,
    raw: bool,
    comparing: bool,
    as_json: bool,
    options: EngineOptions,
) -> None:
    """Answer PROMPT; '-', or nothing where stdin is piped, reads it from stdin."""
    if comparing and options.no_speculation:
        raise click.UsageError("--compare has nothing to compare with --no-speculation")
    if options.sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = _read_prompt(prompt)
    engine = options.load()
    asked = _ask(engine, text, system, raw)
    generation = engine.stream(asked)
    interrupted = write(generation, silent=as_json)
    result = generation.result()
    comparable = result.n_tokens_generated > 0 and not interrupted
    plain = _decode_plain(engine, asked, result) if comparing and comparable else None
    comparison = None if plain is None else compare(result, plain)
    if as_json:
        names = {"target": options.target, "selector": options.selector}
        click.echo(json.dumps(document(result, comparison, names), ensure_ascii=False))
    else:
        console = stderr()
        console.print(f"\n{summary(result)}", soft_wrap=True)
        if comparison is not None:
            console.print(comparison_line(comparison, _repeatable(engine)), soft_wrap=True)
        console.print(arms_table(result))
    if interrupted:
        raise click.exceptions.Exit(130)
    if result.finish_reasons[0] == "error":
        complain("the target's logits are not finite, so the text ends early")
        raise click.exceptions.Exit(1)


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        if sys.stdin.isatty():
            raise click.UsageError("give a prompt, or pipe one to stdin")
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise ValueError("the prompt is empty; give it some text")
    return prompt


def _ask(engine: SpeculativeEngine, text: str, system: str | None, raw: bool) -> Prompt:
    templated = engine.tokenizer is not None and engine.tokenizer.chat_template is not None
    if templated and not raw:
        messages = [{"role": "user", "content": text}]
        return [{"role": "system", "content": system}, *messages] if system else messages
    if system:
        raise ValueError("--system needs the chat template: " + ("drop --raw" if templated else "this target has none"))
    return text


def _repeatable(engine: SpeculativeEngine) -> bool:
    sampling = engine.config.sampling
    return sampling.temperature == 0 or sampling.variant == "coupled"


def _decode_plain(engine: SpeculativeEngine, prompt: Prompt, result: GenerationResult) -> GenerationResult:
    """As many tokens without speculation, with the same weights."""
    from flashspec.engine import SpeculativeEngine
    from flashspec.models.loading import LoadedModel

    loaded = LoadedModel(engine.target, engine.tokenizer, engine.eos_token_ids, "")
    sampling = engine.config.sampling.model_copy(update={"seed": result.seed})
    if not _repeatable(engine):  # another text may end earlier
        sampling = sampling.model_copy(update={"ignore_eos": True, "stop": (), "stop_token_ids": ()})
    count = result.n_tokens_generated
    with Waiting("measuring plain decoding") as waiting:
        plain = SpeculativeEngine(engine.config, [], loaded, arms=["plain"])
        generation = plain.stream(prompt, count, sampling=sampling)
        for written, _ in enumerate(generation, 1):
            waiting("measuring plain decoding", written / count)
    return generation.result()
