"""`flashspec bench`: measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashspec.cli.options import model_options
from flashspec.cli.terminal import Waiting


@click.group(no_args_is_help=False)
def bench() -> None:
    """Measure speed and write it down with its provenance."""


@bench.command()
@model_options
@click.option("--drafter", "drafters", multiple=True, help="As in 'flashspec generate'. Repeatable.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A prompt a line, or JSON lines with 'turns' or 'prompt'. Repeatable.  [default: a few built in]",
)
@click.option(
    "--methods",
    default="hf-float32,hf-bfloat16,plain,auto",
    show_default=True,
    help="Also hf-lookup, hf-assisted, ucb1, thompson, and arms such as ngram:4.",
)
@click.option("--limit", type=click.IntRange(min=1), help="So many prompts of each file.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file; a plot goes beside it.")
def endtoend(methods: str, output: Path | None, **options: Any) -> None:
    """Whole answers: every method on every prompt, interleaved."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)  # a fault here costs no run
    named = {name: value for name, value in options.items() if value not in (None, ())}
    with Waiting() as waiting:
        from rich.console import Console

        from flashspec.bench.endtoend import run
        from flashspec.bench.report import table

        result = run(methods=[name.strip() for name in methods.split(",")], output=output, progress=waiting, **named)
    Console().print(table(result))
