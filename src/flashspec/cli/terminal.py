"""What a terminal shows besides the text: complaints, waiting, Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from flashspec.engine import Chunk

PATIENCE = 1.0  # seconds before anyone wonders what is going on
STARTING = "starting"  # the imports


def complain(sentence: str) -> None:
    click.echo(f"flashspec: {sentence}", err=True)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class Waiting:
    """A `progress(what, fraction or None)` that shows what takes longer than a second: a bar where stderr is a
    terminal, else one line. Ends with `stop`, or as a context."""

    def __init__(self, what: str = STARTING) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self._console = stderr()
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._what = ""
        self._task = TaskID(0)
        self._timer: threading.Timer | None = None
        self(what)

    def __call__(self, what: str, fraction: float | None = None) -> None:
        if what != self._what:
            self._begin(what)
        if fraction is not None:
            self._bar.update(self._task, total=1.0, completed=fraction)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
            if self._bar.live.is_started:
                self._bar.stop()

    def _begin(self, what: str) -> None:
        self._what = what
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(what, total=None)
        if not self._bar.live.is_started:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(PATIENCE, self._show, [what])
            self._timer.daemon = True
            self._timer.start()

    def _show(self, what: str) -> None:
        if self._console.is_terminal:
            self._bar.start()
        elif what != STARTING:  # no news in a log: torch alone takes more than a second, every time
            complain(f"{what} ...")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Sets the event at the first Ctrl-C, so that no step is torn apart; a second one raises KeyboardInterrupt."""
    pressed = threading.Event()

    def press(signum: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def write(chunks: Iterable[Chunk], silent: bool = False) -> bool:
    """Text to stdout as it comes, and a last line break; returns whether Ctrl-C ended it. Warnings wait for the end."""
    with interruptible() as pressed, warnings.catch_warnings(record=True) as caught:
        with Waiting("reading the prompt") as waiting:
            try:
                for chunk in chunks:
                    waiting.stop()
                    if not silent:
                        sys.stdout.write(chunk.text)
                        sys.stdout.flush()
                    if pressed.is_set():
                        break
            except KeyboardInterrupt:
                pass
        interrupted = pressed.is_set()
    if not silent:
        click.echo()
    for warning in caught:
        complain(str(warning.message))
    return interrupted
