"""The commands, and how they end: a foreseeable fault is one sentence on stderr and an exit status."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

import click

import flashspec
from flashspec.cli.bench import bench
from flashspec.cli.chat import chat
from flashspec.cli.generate import generate
from flashspec.cli.models import models
from flashspec.cli.terminal import complain
from flashspec.cli.train import train_drafter

COULD_NOT, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(flashspec.__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Exact speculative decoding: a language model's own text, written faster."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (generate, chat, bench, train_drafter, models):
    commands.add_command(command)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what a terminal's encoding may lack
    status = run(sys.argv[1:])
    if status == BROKEN_PIPE:  # what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_: complain(str(message))
        try:
            with commands.make_context("flashspec", list(arguments)) as context:
                commands.invoke(context)
        except click.exceptions.Exit as end:
            return end.exit_code
        except (click.Abort, KeyboardInterrupt):
            return INTERRUPTED
        except BrokenPipeError:
            return BROKEN_PIPE
        except Exception as error:
            status, sentence = _explain(error)
            complain(sentence)
            return status
    return 0


def _explain(error: Exception) -> tuple[int, str]:
    """Exit status and sentence of a foreseeable fault; any other is raised again."""
    if isinstance(error, click.UsageError):
        hint = f"; see '{error.ctx.command_path} --help'" if error.ctx is not None else ""
        return BAD_INPUT, error.format_message().rstrip(".") + hint
    if isinstance(error, UnicodeDecodeError):
        return BAD_INPUT, f"the input is not UTF-8 text: {error.reason} at byte {error.start}"
    if isinstance(error, OSError):
        return COULD_NOT, str(error)
    if isinstance(error, ValueError):
        from pydantic import ValidationError

        from flashspec.config import explain

        return BAD_INPUT, explain(error) if isinstance(error, ValidationError) else str(error)

    from torch import OutOfMemoryError

    from flashspec.core import FlashSpecError

    if isinstance(error, FlashSpecError):
        return COULD_NOT, str(error)
    if isinstance(error, OutOfMemoryError):
        return COULD_NOT, (
            "the GPU's memory is full: end what else runs on it, or take a smaller model, fewer drafters, "
            "a shorter text (for train-drafter a smaller --draft-vocab) or --device cpu"
        )
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # what torch says on a CPU
        return COULD_NOT, "there is not enough memory: take a smaller model, fewer drafters or a shorter text"
    raise error
