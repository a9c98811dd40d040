"""Who proposes. A drafter is shared by all batches; `start` gives the part that belongs to one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flashspec.core import Draft
from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader


class DraftContext(Protocol):
    """What a proposer may look at: the engine's state of one batch.

    tokens: (B, T) int64, committed text up to lengths (B,) int64, garbage behind. bound: host integer, at least every
    length. texts: the host's copy of the committed text a row; complete for drafters `on_host`.
    active: host copy of which rows are still being written. token_cost: what verifying one more token costs, as a
    fraction of a step without a draft. rival: what another drafter is expected to yield, in tokens for the time of a
    step of this one; a drafter on the host that expects less had better propose nothing. target: the target's reader.
    """

    tokens: Tensor
    lengths: Tensor
    bound: int
    capacity: int
    texts: list[list[int]]
    active: list[bool]
    token_cost: float
    rival: float

    @property
    def target(self) -> Reader: ...

    def add_reader(self, model: LanguageModel, lag: int = 1, make: type[Reader] = Reader) -> Reader:
        """A cache for a drafter's own model, rolled back with the text from now on. lag and make: as of a Reader, and
        the kind of it, where the drafter does not just read the text and its own draft."""
        ...

    def record_features(self, layers: Sequence[int]) -> None:
        """Have the target record these hidden states (`Features.layers`) of all that it reads, in `target.features`.
        Where it has read without, it is behind until the next `catch_up(target)`."""
        ...

    def catch_up(self, reader: Reader) -> None:
        """Have a drafter's model read what it has not seen of the text, but for the last token."""
        ...

    @property
    def one_hot_drafts(self) -> bool:
        """Whether drafts count as certain, whatever they were drawn from."""
        ...

    def draw(self, logits: Tensor, draft: Draft, offset: int, part: Tensor | None = None, least: int = 1) -> None:
        """Draw token `offset` of a draft from logits (B, V) for text position `lengths + offset`, as the request
        samples, and write it there: `kernels.choose_tokens` says what, and of `least`.

        part: (V',) int64, where logits (B, V') are of these tokens only and all others have q = 0."""
        ...


class Proposer(ABC):
    """A drafter at work on one batch. An exception from any method quarantines the drafter, not the request."""

    def prepare(self, context: DraftContext) -> None:
        """Host work before a step: catching up a cache or an index. Its time counts as the arm's."""
        return

    def expects_nothing(self, context: DraftContext, length: int) -> bool:
        """Whether there will hardly be anything to propose, asked of drafters on the host while a step is under way
        whose tokens `texts` lack: if so, another arm drafts, and the device need not wait for the host. Of a guess
        that is wrong only speed depends."""
        return False

    @abstractmethod
    def propose(self, context: DraftContext, length: int) -> Draft:
        """At most `length` tokens a row, as a pure function of tensors unless the drafter works on the host; fewer
        columns than `length`, and tensors on the CPU, may come from a host drafter. Whether a draft is empty may depend
        on the past, but on nothing drawn for this step: another arm may then draft instead, with the same noise. Logits
        must be those the tokens were drawn from; rows with NaN in them have to be named in `faulty`, which
        `DraftContext.draw` does."""


class Drafter(ABC):
    """`name` labels its arms; `lengths` are the draft lengths worth trying when nobody says otherwise, `longest` the
    most that it can draft. `on_host`: its proposers read `texts`, so a step must wait until the host knows the one
    before. `feature_layers`: the target's hidden states that its proposers ask for, so that they can be recorded from
    the beginning."""

    name: str = "drafter"
    lengths: tuple[int, ...] = (2, 4, 8)
    longest: int = 64
    on_host: bool = False
    feature_layers: tuple[int, ...] = ()

    @classmethod
    def create(cls, target: LanguageModel) -> Drafter:
        """The drafter with its default settings for a target; called for drafters that are asked for by name."""
        return cls()

    @abstractmethod
    def start(self, context: DraftContext) -> Proposer:
        """Begin a batch."""

    def learn(self, texts: Sequence[Sequence[int]]) -> None:
        """Finished texts, for drafters that remember earlier requests."""
        return


class NoDraft(Proposer):
    """Plain decoding."""

    def propose(self, context: DraftContext, length: int) -> Draft:
        return Draft.empty(context.tokens.shape[0], context.tokens.device)
