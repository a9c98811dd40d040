"""The command line. Nothing here imports torch before a command needs it: `flashspec --help` answers at once."""

from flashspec.cli.main import main

__all__ = ["main"]
