"""`flashspec models`: what is at hand."""

from __future__ import annotations

import click


@click.command()
def models() -> None:
    """List the cached models and the registered drafters."""
    from rich.console import Console
    from rich.table import Table

    from flashspec.cache import cache_dir
    from flashspec.drafters import list_drafters

    folder, unpacked = cache_dir() / "models", 0
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("cached", overflow="fold")
    table.add_column("MB", justify="right")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        if entry.name.startswith("gguf-"):
            unpacked += size
        else:
            table.add_row(entry.name, f"{size / 1e6:.1f}")
    if unpacked:
        table.add_row("weights unpacked from GGUF files", f"{unpacked / 1e6:.1f}")
    console = Console(highlight=False)
    console.print(f"{folder}" if table.row_count else f"nothing is cached in {folder}", soft_wrap=True, markup=False)
    if table.row_count:
        console.print(table)
    named = ", ".join(name for name in list_drafters() if name != "model")
    console.print(f"drafters: {named}, or any model with the target's vocabulary", soft_wrap=True)
