"""Suffix matching: what is predicted, how far it is trusted, and what is remembered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashspec.drafters.suffix import AT_ONCE, SuffixDrafter, SuffixIndex, Trust


def context_of(
    *texts: list[int], token_cost: float = 0.1, rival: float = 1.0, active: list[bool] | None = None
) -> SimpleNamespace:
    return SimpleNamespace(
        texts=[list(text) for text in texts],
        active=active or [True] * len(texts),
        token_cost=token_cost,
        rival=rival,
        tokens=torch.zeros(len(texts), 1),
    )


def drafts(drafter: SuffixDrafter, *texts: list[int], length: int = 8, **options: object) -> list[list[int]]:
    context = context_of(*texts, **options)  # type: ignore[arg-type]
    proposer = drafter.start(context)
    proposer.prepare(context)
    draft = proposer.propose(context, length)
    assert draft.logits is None and draft.token_ids.shape == (len(texts), max(draft.lengths.tolist()))
    return [ids[:count] for ids, count in zip(draft.token_ids.tolist(), draft.lengths.tolist(), strict=True)]


def index_of(text: list[int], min_match: int = 1, max_match: int = 3) -> SuffixIndex:
    index = SuffixIndex(min_match, max_match)
    for end in range(1, len(text)):
        index.add(text[:end], text[end])
    return index


@pytest.mark.parametrize(
    ("text", "recent", "token_id"),
    [
        ([1, 2, 3, 1, 2, 4, 1, 2, 3], [1, 2], 3),  # the most frequent
        ([1, 2, 3, 1, 2, 4], [1, 2], 4),  # the latest among equals
        ([1, 2, 3, 5, 2, 4, 5, 2, 4], [1, 2], 3),  # the longest match, though 4 is more frequent behind 2
        ([1, 2, 3], [9, 2], 3),  # a shorter match where the longer is unknown
    ],
)
def test_predictions_by_hand(text: list[int], recent: list[int], token_id: int) -> None:
    prediction = index_of(text).predict(recent)
    assert prediction is not None and prediction[0] == token_id


def test_nothing_is_predicted_behind_what_is_new_or_too_short() -> None:
    assert index_of([1, 2, 3]).predict([9]) is None
    assert index_of([1, 2, 3]).predict([]) is None
    assert index_of([1, 2, 3, 1], min_match=2).predict([9, 1]) is None


def test_classes_tell_match_length_evidence_and_agreement_apart() -> None:
    agreed = index_of([1, 2, 1, 2, 1, 2]).predict([1])
    split = index_of([1, 2, 1, 3, 1, 2]).predict([1])
    longer = index_of([1, 2, 1, 2, 1, 2]).predict([2, 1])
    assert agreed is not None and split is not None and longer is not None
    assert len({agreed[1], split[1], longer[1]}) == 3


def test_trust_is_the_observed_rate() -> None:
    trust = Trust()
    assert trust.rate((1, 1)) == 0.5
    for hit in (True, True, True, False):
        trust.record((1, 1), hit)
    assert trust.rate((1, 1)) == pytest.approx(4 / 6) and trust.rate((2, 1)) == 0.5


CYCLE = [1, 2, 3, 4, 5]


def test_trust_is_learned_from_the_prompt() -> None:
    """A prompt that keeps repeating itself earns long drafts; one that repeats and then always differs, none."""
    assert drafts(SuffixDrafter(), CYCLE * 6, length=8) == [[1, 2, 3, 4, 5, 1, 2, 3]]
    misleading = [token for i in range(40) for token in (1, 100 + i)] + [1]
    assert drafts(SuffixDrafter(), misleading, length=8) == [[]]


def test_a_draft_stops_where_it_no_longer_pays() -> None:
    """The dearer a token, the shorter."""
    text = [*CYCLE, 9, *CYCLE, 8, *CYCLE, 7, *CYCLE[:1]]
    lengths = [len(drafts(SuffixDrafter(), text, length=16, token_cost=cost)[0]) for cost in (0.001, 0.1, 0.3, 0.9)]
    assert lengths[-1] == 0 and lengths == sorted(lengths, reverse=True) and len(set(lengths)) >= 3


def test_the_rule_of_when_to_stop_by_hand() -> None:
    """All classes unseen count as one half: a second token would need 0.25 (1 + c) > c (1 + 0.5)."""
    text = [1, 2, 3, 1]
    assert [len(drafts(SuffixDrafter(), text, token_cost=cost)[0]) for cost in (0.6, 0.4, 0.19)] == [0, 1, 2]


def test_a_draft_that_promises_less_than_a_rival_is_not_made() -> None:
    """Two tokens promise 1 + 0.5 + 0.25."""
    text = [1, 2, 3, 1]
    lengths = [len(drafts(SuffixDrafter(), text, token_cost=0.19, rival=rival)[0]) for rival in (1.0, 1.74, 1.76)]
    assert lengths == [2, 2, 0]


def test_nor_is_one_for_which_rows_without_a_draft_would_pay() -> None:
    """One row of two promises 2.75 tokens, in the time of 2 (1 + 2 c)."""
    texts = [1, 2, 3, 1], [5, 6, 7, 8]
    lengths = [len(drafts(SuffixDrafter(), *texts, token_cost=cost)[0]) for cost in (0.18, 0.19)]
    assert lengths == [2, 0]


def test_rows_are_matched_each_for_itself_and_finished_ones_not_at_all() -> None:
    rows = drafts(SuffixDrafter(), CYCLE * 6, [6, 7] * 9, [8] * 9, length=3, active=[True, True, False])
    assert rows == [[1, 2, 3], [6, 7, 6], []]
    assert drafts(SuffixDrafter(), [1], [2]) == [[], []]


def test_new_tokens_are_indexed_once() -> None:
    drafter, context = SuffixDrafter(), context_of([1, 2])
    proposer = drafter.start(context)
    for new in ([], [1], [2, 1, 2]):
        context.texts[0] += new
        proposer.prepare(context)
    prediction = proposer.indexes[0].predict([1])  # type: ignore[attr-defined]
    assert proposer.indexes[0]._following[(1,)] == {2: 3} and prediction == (2, (1, 15))  # type: ignore[attr-defined]


def test_earlier_requests_are_remembered_only_when_asked() -> None:
    earlier, text = [[*range(50, 70)]], [1, 50, 51, 52]
    remembering, forgetting = SuffixDrafter(remember=True), SuffixDrafter()
    for drafter in (remembering, forgetting):
        assert drafts(drafter, text) == [[]]
        for _ in range(3):
            drafter.learn(earlier)
    assert drafts(remembering, text)[0][:2] == [53, 54]
    assert drafts(forgetting, text) == [[]]


def test_the_longer_match_wins_between_own_text_and_memory() -> None:
    drafter = SuffixDrafter(remember=True)
    drafter.learn([[1, 2, 3, 4]] * 3)
    assert drafts(drafter, [3, 9, 0, 1, 2, 3], length=1) == [[4]]  # three tokens of memory before one of its own
    assert drafts(drafter, [0, 1, 2, 3, 9, 0, 1, 2, 3], length=1) == [[9]]  # four of its own


@pytest.mark.parametrize(("min_match", "max_match"), [(0, 3), (4, 3)])
def test_bad_sizes_are_refused(min_match: int, max_match: int) -> None:
    with pytest.raises(ValueError, match="min_match"):
        SuffixDrafter(min_match, max_match)


def test_a_long_text_is_read_piece_by_piece_while_the_device_works() -> None:
    texts = [[*range(AT_ONCE), *range(AT_ONCE)], [5, 6, 7, 5, 6]]
    context, drafter = context_of(*texts), SuffixDrafter()
    proposer = drafter.start(context)
    assert proposer.expects_nothing(context, 8) and proposer.indexed == [1 + AT_ONCE, 1]  # type: ignore[attr-defined]
    assert proposer.expects_nothing(context, 8) and proposer.indexed == [2 * AT_ONCE, 2]  # type: ignore[attr-defined]
    assert not proposer.expects_nothing(context, 8) and proposer.indexed == [2 * AT_ONCE, 5]  # type: ignore[attr-defined]
    assert drafts(SuffixDrafter(), *texts) == proposer._drafts(context, 8)  # type: ignore[attr-defined]


def test_the_longest_text_is_read_within_a_few_steps() -> None:
    context = context_of([*range(40 * AT_ONCE)])
    proposer, read = SuffixDrafter().start(context), [1]
    while read[-1] < 40 * AT_ONCE:
        assert proposer.expects_nothing(context, 8)
        read += proposer.indexed  # type: ignore[attr-defined]
    assert read[1] == 1 + (40 * AT_ONCE - 1) // 8 and len(read) < 24


def test_what_is_asked_for_waits_for_all_of_a_text() -> None:
    text = [1, 2, *range(10, 10 + 3 * AT_ONCE), 1]
    context = context_of(text)
    proposer = SuffixDrafter().start(context)
    assert proposer.expects_nothing(context, 8)
    proposer.prepare(context)
    assert proposer.propose(context, 8).token_ids[0].tolist()[:2] == [2, 10]
