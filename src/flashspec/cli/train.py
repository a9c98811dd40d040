"""`flashspec train-drafter`: a drafter for a target, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashspec.cli.terminal import Waiting, complain, interruptible, stderr

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flashspec.training import Outcome
    from flashspec.training.measure import Measure


MINUTES = 20.0


@click.command("train-drafter")
@click.option("--target", default="smollm2", show_default=True, help="Hugging Face id, folder or GGUF file.")
@click.option(
    "--kind",
    type=click.Choice(["eagle3", "medusa", "tiny"]),
    default="eagle3",
    show_default=True,
    help="A layer over the target's features, heads on its last one, or a small model of its own.",
)
@click.option(
    "--minutes",
    type=float,
    help=f"For everything, the text included.  [default: {MINUTES:g}; with --resume as before]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A new folder, or with --resume an old one."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A prompt a line, or JSON lines with 'turns' or 'prompt'.  [default: the target thinks of its own]",
)
@click.option(
    "--texts",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The --out of an earlier training of this target: take its texts, and write none.",
)
@click.option("--device", help="cpu or cuda.  [default: what the machine has]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--draft-vocab", type=click.IntRange(min=2), default=16384, show_default=True, help="The most tokens it can draft."
)
@click.option(
    "--share-lm-head",
    is_flag=True,
    help="Keep the target's LM head in place of its own: a smaller file, and better Medusa heads.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on in --out where it was left, perhaps with more --minutes; from the beginning if nothing is there.",
)
def train_drafter(
    target: str,
    kind: str,
    minutes: float | None,
    out: Path,
    prompts: Path | None,
    texts: Path | None,
    device: str | None,
    seed: int,
    draft_vocab: int,
    share_lm_head: bool,
    resume: bool,
) -> None:
    """Train a drafter for TARGET on text that the target writes itself. Ctrl-C keeps what there is.

    TARGET is of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM2."""
    if minutes is not None and not 0 < minutes < float("inf"):
        raise click.UsageError(f"--minutes is {minutes:g}; it should be a number above 0")
    if resume and not out.exists():
        complain(f"there is nothing at --out {out} yet: the training begins there")
    with Waiting():
        from flashspec.models.loading import check_device
        from flashspec.training import Kind, Settings, earlier_seconds
        from flashspec.training import train_drafter as train

        if device is not None:
            check_device(device)
        seconds = 60 * minutes if minutes is not None else (resume and earlier_seconds(out)) or 60 * MINUTES
        settings = Settings.of(
            Kind(kind), shares_lm_head=share_lm_head, seconds=seconds, seed=seed, draft_vocab=draft_vocab
        )
    console = stderr()
    with interruptible() as pressed, Bar(console) as bar:
        outcome = train(
            target,
            out,
            settings,
            prompts=prompts,
            texts=texts,
            device=device,
            resume=resume,
            stopped=pressed.is_set,
            progress=bar,
            measured=lambda measure: _tell(console, measure),
        )
    if outcome.measures:
        console.print(_table(outcome))
    if outcome.interrupted:
        hint = f"stopped; the same command with --resume goes on in {outcome.folder}"
        console.print(hint, soft_wrap=True, markup=False)
        raise click.exceptions.Exit(130)
    console.print(f"use it with --drafter {outcome.folder}", soft_wrap=True, markup=False)


class Bar:
    """A `progress(what, fraction or None)` whose words change as it moves; one line a stage where stderr is no
    terminal, a stage being what stands before the colon."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)
        self._console, self._stage = console, ""

    def __call__(self, what: str, fraction: float | None = None) -> None:
        stage = what.partition(":")[0]
        if stage != self._stage and not self._console.is_terminal:
            complain(f"{stage} ...")
        self._stage = stage
        total = None if fraction is None else 1.0
        self._bar.update(self._task, description=what, total=total, completed=fraction or 0.0)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _tell(console: Console, measure: Measure) -> None:
    console.print(
        f"{measure.seconds:6.0f} s  {measure.tokens:>12,} tokens  held-out loss {measure.loss:.3f}  "
        f"{measure.length:.2f} tokens a step",
        soft_wrap=True,
    )


def _table(outcome: Outcome) -> Table:
    from rich.table import Table

    last = outcome.measures[-1]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("kind", "parameters", "MB", "held-out loss", "tokens a step", "accepted by position"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    table.add_row(
        outcome.kind,
        f"{outcome.parameters:,}",
        f"{outcome.bytes / 1e6:.1f}",
        f"{last.loss:.3f}",
        f"{last.length:.2f}",
        " ".join(f"{rate:.2f}" for rate in last.acceptance),
    )
    return table
