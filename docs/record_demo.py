"""Draw docs/demo.svg: run the demo in a terminal of its own and keep what stands on the screen at the end."""

from __future__ import annotations

import io
import os
import pty
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROMPT = "Write a Python function that checks whether a word is a palindrome, then explain it."
COMMAND = ["flashspec", "generate", "--compare", PROMPT]
WIDTH = 100

heard = bytearray()


def read(descriptor: int) -> bytes:
    piece = os.read(descriptor, 4096)
    heard.extend(piece)
    return piece


os.environ.update(COLUMNS=str(WIDTH), LINES="60", TERM="xterm-256color")
pty.spawn(COMMAND, read)
console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
console.print(Text.from_ansi(f'$ flashspec generate --compare "{PROMPT}"'))
screen = re.sub(r"\x1b\[\?25[lh]|\r", "", heard.decode("utf-8"))
screen = re.sub(r"[^\n]*\n\x1b\[1A\x1b\[2K|[^\n]*\x1b\[2K", "", screen)  # what progress bars drew and wiped away
console.print(Text.from_ansi(screen))
console.save_svg(str(Path(__file__).with_name("demo.svg")), title="flashspec")
