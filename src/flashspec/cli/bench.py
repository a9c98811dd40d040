"""`flashspec bench`: measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from flashspec.cli.options import model_options
from flashspec.cli.terminal import Waiting

RESULT = click.Path(exists=True, dir_okay=False, path_type=Path)
SHAPES = click.Choice(["135m", "1b", "8b", "70b"])


def _words(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    parts = _words(context, option, value)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} should be numbers from 1 up, such as 1,4,16")
    return [int(part) for part in parts]


def _methods(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    found = _words(context, option, value)
    if not found:
        raise click.BadParameter(f"{value!r} names no method; it should be such as plain,auto")
    return found


def _json_path(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix != ".json":
        raise click.BadParameter(f"'{value}' should end in .json: the CSV and the plot that go beside it have its name")
    return value


batch_size_option = click.option(
    "--batch-size",
    "batch_sizes",
    default="",
    callback=_numbers,
    help="Rows decoded together, such as 1,4,16: throughput by batch size.  [default: 1]",
)
output_option = click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_json_path,
    help="A .json file; CSV and a plot go beside it.",
)


drafter_option = click.option(
    "--drafter",
    "drafters",
    multiple=True,
    help="As in 'flashspec generate'; an arm calls it by its last part, a head by its kind, too. Repeatable.",
)


@click.group(no_args_is_help=False)
def bench() -> None:
    """Measure speed and write it down with its provenance."""


@bench.command()
@model_options
@click.option("--shape", type=SHAPES, help="Widen the target: its text, at the cost of a model of that shape.")
@drafter_option
@click.option(
    "--prompts",
    multiple=True,
    type=RESULT,
    help="A prompt a line, or JSON lines with 'turns' or 'prompt'. Repeatable.  [default: a few built in]",
)
@click.option(
    "--methods",
    default="hf-float32,hf-bfloat16,plain,auto",
    show_default=True,
    callback=_methods,
    help="Also hf-compiled (on a GPU), hf-lookup, hf-assisted, arms such as ngram:4 or eagle3:4, and the selectors "
    "ucb1 and thompson; auto@arms, ucb1@arms and thompson@arms choose among the arms of this list.",
)
@click.option("--limit", type=click.IntRange(min=1), help="So many prompts of each file, or of those built in.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True)
@batch_size_option
@output_option
def endtoend(**options: Any) -> None:
    """Whole answers: every method on every prompt, interleaved."""
    from flashspec.bench.endtoend import run

    _measure(run, options)


@bench.command()
@click.option("--kernel", "kernels", multiple=True, help="Only this one. Repeatable.  [default: all]")
@click.option("--quick", is_flag=True, help="A small grid of shapes.")
@output_option
def kernels(**options: Any) -> None:
    """Kernels against the memory's speed, PyTorch and FlashInfer, inside CUDA graphs."""
    from flashspec.bench.kernels import run

    _measure(run, options)


@bench.command()
@model_options
@click.option("--shape", type=SHAPES, help="Widen the target to it.")
@drafter_option
@click.option("--random", is_flag=True, help="Random weights of the shape, in place of a widened target.")
@click.option("--widths", default="1,2,5,9,17", show_default=True, callback=_numbers, help="Tokens a forward.")
@batch_size_option
@click.option(
    "--arms",
    default="plain,ngram:1,ngram:2,ngram:4,ngram:8,ngram:16,early-exit:4",
    show_default=True,
    callback=_words,
    help="Whole steps of these.",
)
@click.option("--drafter-sizes", default="", callback=_words, help="Random drafters, of 30m,135m,360m,1b.")
@click.option(
    "--baselines",
    default="",
    callback=_words,
    help="transformers-eager, transformers-graph, transformers-compiled (takes minutes).",
)
@click.option("--context", type=click.IntRange(min=128), default=1024, show_default=True, help="Tokens in the cache.")
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True)
@output_option
def steps(
    widths: list[int],
    batch_sizes: list[int],
    arms: list[str],
    drafter_sizes: list[str],
    baselines: list[str],
    **options: Any,
) -> None:
    """What a step is made of: forwards by width, arms, drafters by size; times, and the share of the memory's speed."""
    if options["random"] and options["shape"] is None:
        raise click.UsageError("--random needs --shape, such as 8b")
    given = click.get_current_context().get_parameter_source("target")
    if options["random"] and given is not ParameterSource.DEFAULT:
        raise click.UsageError("--random weights are no --target's: leave one of them out")
    from flashspec.bench.steps import Plan, run

    plan = Plan(widths, batch_sizes or [1], arms, drafter_sizes, baselines)
    _measure(run, options | {"plan": plan})


@bench.command()
@click.argument("old", type=RESULT)
@click.argument("new", type=RESULT)
@click.option(
    "--tolerance",
    type=click.FloatRange(0.0, 1.0),
    default=0.05,
    show_default=True,
    help="How far a figure may fall. Shares of the same text may not.",
)
@click.option("--all", "everything", is_flag=True, help="List what did not fall, too.")
def compare(old: Path, new: Path, tolerance: float, everything: bool) -> None:
    """Whether NEW is slower than OLD, accepts less, writes other texts or lacks figures; exit status 1 if so."""
    from rich.console import Console

    from flashspec.bench.compare import compare as compare_files
    from flashspec.core import FlashSpecError

    found = compare_files(old, new, tolerance)
    table = found.table(everything)
    Console().print(table if table.row_count else f"{found.heading}: none fell", highlight=False)
    if found.regressions:
        count, total = len(found.regressions), len(found.changes)
        raise FlashSpecError(
            f"{count} of {total} figures fell, by more than {tolerance:.0%} or, of the same text, at all"
        )
    if found.missing:
        count, named = len(found.missing), ", ".join(found.missing[:3])
        raise FlashSpecError(f"{new} lacks {count} things that {old} has: {named}{', …' if count > 3 else ''}")


def _measure(run: Callable[..., dict[str, Any]], options: dict[str, Any]) -> None:
    """Run a benchmark with the options that were given, and print its table."""
    from rich.console import Console

    from flashspec.bench.report import table

    if options["output"] is not None:
        _try_to_write(options["output"])
    named = {name: value for name, value in options.items() if value not in (None, (), [])}
    with Waiting() as waiting:
        result = run(progress=waiting, **named)
    Console().print(table(result))


def _try_to_write(path: Path) -> None:
    """A fault here costs no run."""
    trial = path.with_name(path.name + ".part")  # as the result will be, before it has its name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"--output {path} cannot be written: {error.strerror}") from None
