"""What a step is made of, against the memory's speed and against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashspec.bench import report
from flashspec.bench.baselines import llama_twin
from flashspec.bench.cases import dtype_name
from flashspec.bench.methods import Setup
from flashspec.bench.parts import Bench, Row
from flashspec.bench.provenance import provenance
from flashspec.bench.shapes import DRAFTER_SHAPES, find_shape, random_decoder, shape_config
from flashspec.bench.timing import copy_bandwidth, make_timer
from flashspec.config import SamplingConfig, default_device
from flashspec.core import Arm, FlashSpecError
from flashspec.drafters import Drafter
from flashspec.drafters.model import ModelDrafter
from flashspec.models.embedded import Progress, silent
from flashspec.models.loading import LoadedModel, check_device

ARMS = ("plain", "ngram:1", "ngram:2", "ngram:4", "ngram:8", "ngram:16", "early-exit:4")
BASELINES = ("transformers-eager", "transformers-graph", "transformers-compiled")
DRAFTER_LENGTH = 4
COPY_ELEMENTS = {"cuda": 2**28, "cpu": 2**26}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. drafter_sizes: random drafters of DRAFTER_SHAPES at 4 draft tokens, whose time is real, not
    their acceptance. baselines: of BASELINES, at baseline_widths. FlashSpecError or ValueError names what there
    is not."""

    widths: Sequence[int] = (1, 2, 5, 9, 17)
    batch_sizes: Sequence[int] = (1,)
    arms: Sequence[str] = ARMS
    drafter_sizes: Sequence[str] = ()
    baselines: Sequence[str] = ()
    baseline_widths: Sequence[int] = (1, 5)

    def __post_init__(self) -> None:
        self.arms_of()
        for name, chosen, known in (
            ("drafter size", self.drafter_sizes, DRAFTER_SHAPES),
            ("baseline", self.baselines, BASELINES),
        ):
            for value in chosen:
                if value not in known:
                    raise FlashSpecError(f"{name} {value!r} is unknown; there are {', '.join(known)}")

    def arms_of(self) -> list[Arm]:
        return [Arm.parse(name) for name in self.arms]

    def all_widths(self) -> list[int]:
        """A plain step's and those of the arms are among them."""
        lengths = [arm.length for arm in self.arms_of()] + [DRAFTER_LENGTH] * bool(self.drafter_sizes)
        return sorted({1, *self.widths, *(length + 1 for length in lengths)})


DEFAULT = Plan()


def run(
    target: str | LoadedModel = "smollm2",
    shape: str | None = None,
    random: bool = False,
    context: int = 1024,
    new_tokens: int = 64,
    temperature: float = 0.0,
    replays: int = 50,
    calls: int = 4,
    device: str | None = None,
    dtype: str = "auto",
    output: Path | None = None,
    progress: Progress | None = None,
    plan: Plan = DEFAULT,
    drafters: Sequence[str] = (),
) -> report.Result:
    """Returns {"kind", "provenance", "settings", "rows"}, written to `output` with CSV and plot beside it.

    The target is a model; with a shape that model widened, or random weights of the shape where `random` says so.
    Forwards are timed inside CUDA graphs on a GPU, by the clock on a CPU; MBU is the weights' bytes over the time, as a
    share of the bandwidth that a copy reached in this run. drafters: models and heads that arms may name; what each of
    them takes to draft is measured by itself too. A baseline that transformers cannot run is left out, and
    the settings say why. FlashSpecError or ValueError, before anything is measured, for what cannot be."""
    tell, device = progress or silent, device or default_device()
    check_device(device)
    SamplingConfig(temperature=temperature)
    if (widest := max(plan.all_widths())) > context:
        raise FlashSpecError(f"{widest} tokens do not fit into a context of {context}")
    origin = provenance(device)
    tell("making the target", None)
    setup = _setup(target, drafters, shape, random, device, dtype)
    loaded = setup.loaded
    for arm in plan.arms_of():
        if arm.length:
            setup.find(arm.drafter)
    if context > loaded.model.max_context:
        raise FlashSpecError(f"{loaded.name} takes {loaded.model.max_context} tokens, not a context of {context}")
    clock = make_timer("cpu", max(replays // 5, 1), calls)
    timer = make_timer(device, replays, calls) if device.startswith("cuda") else clock
    bandwidth = copy_bandwidth(device, timer, COPY_ELEMENTS[torch.device(device).type])
    bench = Bench(loaded, device, timer, clock, calls, bandwidth, context, new_tokens, temperature)
    rows, missing = list(_ours(bench, setup, plan, tell)), list[str]()
    rows += _baselines(bench, plan, missing, tell)
    settings = {
        "target": loaded.name,
        "dtype": dtype_name(loaded.model.dtype),
        "context": context,
        "temperature": temperature,
        "replays": replays,
        "calls": calls,
        "copy_tb_per_second": round(bandwidth / 1e12, 4),
        "left_out": missing,
    }
    result = {"kind": "steps", "provenance": origin, "settings": settings, "rows": rows}
    if output is not None:
        report.write(result, output)
    return result


def _setup(
    target: str | LoadedModel, drafters: Sequence[str], shape: str | None, random: bool, device: str, dtype: str
) -> Setup:
    if isinstance(target, LoadedModel):
        return Setup.of(target, drafters, device, dtype)
    if not (shape and random):
        return Setup.load(target, drafters, device, dtype, shape=shape)
    found = find_shape(shape)
    auto = "bfloat16" if device.startswith("cuda") else "float32"
    kind: torch.dtype = getattr(torch, auto if dtype == "auto" else dtype)
    model = random_decoder(shape_config(found), kind, torch.device(device))
    return Setup.of(LoadedModel(model, None, (), f"{found.title}-shaped (random weights)"), drafters, device, dtype)


def _ours(bench: Bench, setup: Setup, plan: Plan, tell: Progress) -> Iterator[Row]:
    model = bench.target.model
    for batch_size in plan.batch_sizes:
        for width in plan.all_widths():
            tell(f"forwards of {bench.target.name}", None)
            yield bench.forward(batch_size, width)
        for arm in plan.arms_of():
            tell(f"steps of {arm}", None)
            named = setup.drafter(arm.drafter) if arm.length else None
            if isinstance(named, ModelDrafter):
                yield bench.forward(batch_size, 1, named)
            if isinstance(named, Drafter):
                yield bench.draft(arm, named, batch_size)
            yield bench.step(arm, named, batch_size)
        for name in plan.drafter_sizes:
            tell(f"a drafter of {name}", None)
            config = shape_config(DRAFTER_SHAPES[name], model.vocab_size, model.max_context)
            drafter = ModelDrafter(random_decoder(config, model.dtype, model.device), name)
            yield bench.forward(batch_size, 1, drafter)
            yield bench.step(Arm(name, DRAFTER_LENGTH), drafter, batch_size)


def _baselines(bench: Bench, plan: Plan, missing: list[str], tell: Progress) -> Iterator[Row]:
    """missing: gets a sentence for each baseline that cannot be had."""
    for method in plan.baselines:
        try:
            twin = llama_twin(bench.target.model)
            for batch_size in plan.batch_sizes:
                for width in plan.baseline_widths:
                    tell(f"{method}, {width} tokens", None)
                    yield bench.baseline(method, twin, batch_size, width)
        except Exception as error:  # transformers, a capture and a compiler raise almost anything
            missing.append(f"{method}: {str(error).splitlines()[0]}")
