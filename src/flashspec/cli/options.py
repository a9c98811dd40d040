"""Options that several commands share, and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from flashspec.cli.terminal import Waiting

if TYPE_CHECKING:
    from flashspec.config import FlashSpecConfig
    from flashspec.core import Arm
    from flashspec.drafters import Drafter
    from flashspec.engine import SpeculativeEngine
    from flashspec.models.loading import LoadedModel

Command = Callable[..., None]


def _parse_lengths(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")] if value else []
    if not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise click.BadParameter(f"{value!r} should be numbers from 1 to 64, such as 2,4,8")
    return tuple(dict.fromkeys(map(int, parts)))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user named; `load` makes the engine."""

    target: str
    drafter: tuple[str, ...]
    selector: str
    lengths: tuple[int, ...]
    arm: tuple[str, ...]
    no_speculation: bool
    device: str | None
    dtype: str
    max_new_tokens: int
    sampling: Mapping[str, Any]

    def config(self) -> FlashSpecConfig:
        from flashspec.config import BanditConfig, FlashSpecConfig, SamplingConfig

        sampling = SamplingConfig(**self.sampling)
        settings = {
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "bandit": BanditConfig.model_validate({"strategy": self.selector, "seed": sampling.seed}),
            "sampling": sampling,
        }
        return FlashSpecConfig.model_validate(settings | ({"device": self.device} if self.device else {}))

    def load(self) -> SpeculativeEngine:
        """ValueError or FlashSpecError says what cannot be had."""
        with Waiting() as waiting:
            from flashspec.models.loading import check_device

            config = self.config()
            check_device(config.device)
            return self._build(config, waiting)

    def _build(self, config: FlashSpecConfig, progress: Waiting) -> SpeculativeEngine:
        from flashspec.core import PLAIN, Arm
        from flashspec.engine import SpeculativeEngine
        from flashspec.engine.arms import default_drafters, load_drafter, make_drafter, unique_names
        from flashspec.models.loading import load_model

        def load(source: str) -> LoadedModel:
            return load_model(source, device=config.device, dtype=config.dtype, progress=progress)

        arms = [PLAIN] if self.no_speculation else [Arm.parse(name) for name in self.arm]
        playing = tuple(dict.fromkeys(arm.drafter for arm in arms if arm.length))
        named = playing if self.no_speculation else self.drafter or playing
        target = load(self.target)
        sources = named or (() if arms else default_drafters(target.model, self.selector))
        drafters = unique_names(
            [make_drafter(source, target.model, lambda name: load_drafter(name, load)) for source in sources]
        )
        arms = arms or self._cross(drafters)
        if self.selector == "fixed" and len(arms) > 1:
            raise ValueError(f"selector 'fixed' plays one arm: name it, for example --arm {arms[0]}")
        progress("warming up")
        engine = SpeculativeEngine(config, list(drafters.values()), target, arms=arms)
        engine.warm_up()
        return engine

    def _cross(self, drafters: Mapping[str, Drafter]) -> list[Arm]:
        """Every drafter at every length, and plain decoding where there is a choice."""
        from flashspec.core import PLAIN, Arm

        drafting = [Arm(name, length) for name in drafters for length in self.lengths or drafters[name].lengths]
        return drafting if self.selector == "fixed" else [PLAIN, *drafting]


def model_options(command: Command) -> Command:
    """--target, --device, --dtype."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Precision of the weights; auto is what suits the device.",
        ),
        click.option("--device", help="cpu or cuda.  [default: what the machine has]"),
        click.option(
            "--target",
            default="smollm2",
            show_default=True,
            help="Hugging Face id, folder or GGUF file; smollm2 is the embedded SmolLM2-135M-Instruct.",
        ),
    ):
        command = option(command)
    return command


_SPECULATION = (
    click.option(
        "--drafter",
        multiple=True,
        help="A registered name (see 'flashspec models'), a head's folder or a model like --target. Repeatable.  "
        "[default: suffix, and eagle3 where its head for the target comes with FlashSpec; selector fixed: suffix]",
    ),
    click.option(
        "--selector",
        type=click.Choice(["auto", "ucb1", "thompson", "fixed"]),
        default="auto",
        show_default=True,
        help="How the arm of each step is chosen.",
    ),
    click.option(
        "--lengths",
        default="",
        callback=_parse_lengths,
        help="Draft lengths, such as 2,4,8: every drafter at each of them, and plain decoding.",
    ),
    click.option("--arm", multiple=True, help="An exact arm instead, such as ngram:4 or plain. Repeatable."),
    click.option("--no-speculation", is_flag=True, help="Plain decoding only, whatever drafters are named."),
)
_SAMPLING = (
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="0 is greedy, so that a run can be repeated; higher is more varied.",
    ),
    click.option("--top-k", type=int, default=0, help="Only the k most likely tokens; 0 is off."),
    click.option("--top-p", type=float, default=1.0, help="Only the likeliest tokens that sum to p; 1 is off."),
    click.option("--min-p", type=float, default=0.0, help="Only tokens at least p times as likely as the first."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1, prompt and text repeat less."),
    click.option("--presence-penalty", type=float, default=0.0, help="Off the logits of tokens written before."),
    click.option("--frequency-penalty", type=float, default=0.0, help="The same, for every time they were."),
    click.option(
        "--seed",
        type=int,
        help="Repeats sampled text with --variant coupled or a single arm; else arms, and so the "
        "text, follow the clock.  [default: a fresh one]",
    ),
    click.option("--stop", multiple=True, help="End ahead of this text. Repeatable."),
    click.option("--min-tokens", type=int, default=0, help="No end before so many tokens."),
    click.option(
        "--variant",
        type=click.Choice(["rejection", "coupled", "typical"]),
        default="rejection",
        show_default=True,
        help="How drafts are verified; typical is not exact.",
    ),
)


def engine_options(command: Command) -> Command:
    """Adds the options and hands the command an `EngineOptions` as `options`."""

    @wraps(command)
    def collect(**values: Any) -> None:
        from flashspec.config import SamplingConfig

        if values["lengths"] and values["arm"]:
            raise click.UsageError("--lengths says nothing beside --arm, which names its own length: drop one of them")
        if values["min_tokens"] > values["max_new_tokens"]:
            most, least = values["max_new_tokens"], values["min_tokens"]
            raise click.UsageError(f"--min-tokens is {least}; it should be at most --max-new-tokens, {most}")
        sampling = {name: values.pop(name) for name in SamplingConfig.model_fields if name in values}
        named = {field.name: values.pop(field.name) for field in fields(EngineOptions) if field.name in values}
        command(options=EngineOptions(**named, sampling=sampling), **values)

    decorated: Command = collect
    limit = click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="The longest answer."
    )
    for option in reversed((*_SPECULATION, limit, *_SAMPLING)):
        decorated = option(decorated)
    return model_options(decorated)
