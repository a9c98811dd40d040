"""`flashspec chat`: a conversation that keeps what it has read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from flashspec.cli.options import EngineOptions, engine_options
from flashspec.cli.report import summary
from flashspec.cli.terminal import complain, stderr, write

if TYPE_CHECKING:
    from flashspec.engine import Conversation

COMMANDS = "/reset starts over, /system TEXT starts over with a system message, /exit leaves"


@click.command()
@click.option("--system", help="What the model is told ahead of the conversation.")
@engine_options
def chat(system: str | None, options: EngineOptions) -> None:
    """Talk with the target, one message a line. Ctrl-C ends an answer, Ctrl-D leaves.

    /reset starts over, /system TEXT starts over with a system message, /exit leaves.
    """
    from flashspec.core import FlashSpecError

    engine = options.load()
    if engine.tokenizer is None or engine.tokenizer.chat_template is None:
        raise FlashSpecError(f"{options.target} has no chat template: 'flashspec generate' continues plain text")
    interactive = sys.stdin.isatty()
    if interactive:
        stderr().print(f"{options.target}: {COMMANDS}", style="dim", markup=False)
    conversation = engine.conversation(system)
    while (line := _read_line(interactive)) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            system = rest.strip() if command == "/system" else system
            conversation = engine.conversation(system)
        elif command[:1] == "/" and command[1:].isalpha():
            complain(f"there is no {command}; {COMMANDS}")
        elif command:
            try:
                _answer(conversation, line)
            except (FlashSpecError, ValueError) as error:
                if not interactive:
                    raise
                complain(str(error))


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of input."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        if interactive:
            click.echo()
        return None
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo()
        return ""


def _answer(conversation: Conversation, message: str) -> None:
    """A message that cannot be answered leaves the conversation as it was."""
    before = len(conversation.messages)
    try:
        write(conversation.send(message))
    except Exception:
        del conversation.messages[before:]
        raise
    result = conversation.last.result()
    stderr().print(summary(result), style="dim", soft_wrap=True)
    if result.finish_reasons[0] == "error":
        complain("the target's logits are not finite, so the answer ends early")
