"""What a run tells about itself, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from flashspec.core import GenerationResult, TokenLogprobs


def summary(result: GenerationResult) -> str:
    parts = [
        f"{result.n_tokens_generated} tokens in {result.seconds:.2f} s",
        f"{result.tokens_per_second:.1f} tokens/s",
    ]
    if any(step.drafted for step in result.steps):
        parts.append(f"acceptance length {result.acceptance_length:.2f}")
        parts.append(f"{result.acceptance_rate:.0%} of drafted tokens accepted")
    return ", ".join(parts)


def arms_table(result: GenerationResult) -> Table:
    from rich.table import Table
    from rich.text import Text

    from flashspec.metrics.arms import summarise_arms

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("arm", overflow="fold")
    for heading in ("steps", "share", "drafted", "accepted", "tokens/s"):
        table.add_column(heading, justify="right")
    for arm in summarise_arms(result.steps):
        table.add_row(
            Text(arm.arm),
            str(arm.steps),
            f"{arm.share:.0%}",
            str(arm.drafted),
            str(arm.accepted),
            f"{arm.tokens_per_second:.1f}",
        )
    return table


def compare(result: GenerationResult, plain: GenerationResult) -> dict[str, Any]:
    ratio = result.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
    return {
        "tokens": plain.n_tokens_generated,
        "tokens_per_second": plain.tokens_per_second,
        "ratio": ratio,
        "identical": result.output_ids.tolist() == plain.output_ids.tolist(),
    }


def comparison_line(comparison: dict[str, Any], repeatable: bool) -> str:
    """repeatable: both runs should have written the same text."""
    line = (
        f"plain decoding of {comparison['tokens']} tokens: {comparison['tokens_per_second']:.1f} tokens/s; "
        f"speculation is {comparison['ratio']:.2f}x as fast"
    )
    if repeatable:
        line += ", and the text is identical" if comparison["identical"] else ", but the text differs"
    return line


def document(result: GenerationResult, comparison: dict[str, Any] | None, names: dict[str, Any]) -> dict[str, Any]:
    """names: what was asked of whom, taken over as it is."""
    from flashspec.metrics.arms import summarise_arms

    found = {
        "text": result.text,
        "token_ids": result.output_ids[0].tolist(),
        "finish_reason": result.finish_reasons[0],
        **names,
        "seed": result.seed,
        "prompt_tokens": result.prompt_lengths[0],
        "tokens": result.n_tokens_generated,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "acceptance_rate": result.acceptance_rate,
        "acceptance_length": result.acceptance_length,
        "arms": [arm.as_dict() for arm in summarise_arms(result.steps)],
    }
    if result.logprobs is not None:
        found["logprobs"] = [_logprobs(token) for token in result.logprobs[0]]
    if comparison is not None:
        found["plain"] = comparison
    return found


def _logprobs(token: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top]
    return {"token_id": token.token_id, "logprob": token.logprob, "top": top}
