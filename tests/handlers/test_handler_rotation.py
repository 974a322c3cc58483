"""The saved checkpoints that stay: the newest ones, the best ones, and those that are kept beside them."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.handlers.rotation import SavedCheckpoint, rotated, should_save

SCORES = st.lists(st.sampled_from([-math.inf, -1.0, 0, 0.5, 2, math.inf, math.nan]), max_size=12)
N_SAVED = st.none() | st.integers(1, 4)


def save_all(
    priorities: list[float],
    *,
    scored: bool,
    n_saved: int | None,
    equal: bool = False,
    kept: frozenset[str] = frozenset(),
) -> tuple[list[SavedCheckpoint], list[str]]:
    """Save a checkpoint for each priority; return those that stay, and the names of the removed ones in order."""
    saved: list[SavedCheckpoint] = []
    removed_names: list[str] = []
    for number, priority in enumerate(priorities):
        if should_save(saved, priority, scored=scored, n_saved=n_saved, equal_is_better=equal):
            new = SavedCheckpoint(priority, f"c{number}")
            saved, removed = rotated(saved, new, scored=scored, n_saved=n_saved, keeps=kept.__contains__)
            assert new in saved
            removed_names += [checkpoint.filename for checkpoint in removed]
    return saved, removed_names


def sorted_scores(scores: list[float]) -> list[float]:
    """Return the scores from worst to best; a nan is the worst of all."""
    return sorted(-math.inf if math.isnan(score) else score for score in scores)


@settings(max_examples=50)
@given(SCORES, N_SAVED, st.booleans())
def test_the_best_scores_stay(scores: list[float], n_saved: int | None, equal: bool) -> None:
    saved, removed = save_all(scores, scored=True, n_saved=n_saved, equal=equal)
    best = sorted_scores(scores) if n_saved is None else sorted_scores(scores)[-n_saved:]
    assert sorted_scores([checkpoint.priority for checkpoint in saved]) == best
    assert [-math.inf if math.isnan(c.priority) else c.priority for c in saved] == best  # in the order of removal
    assert not {checkpoint.filename for checkpoint in saved} & set(removed)


@settings(max_examples=50)
@given(st.integers(0, 9), N_SAVED, st.frozensets(st.sampled_from([f"c{number}" for number in range(9)])))
def test_the_newest_stay_and_those_that_are_kept(count: int, n_saved: int | None, kept: frozenset[str]) -> None:
    saved, removed = save_all(list(range(count)), scored=False, n_saved=n_saved, kept=kept)
    newest = range(count) if n_saved is None else range(max(0, count - n_saved), count)
    stay = [number for number in range(count) if number in newest or f"c{number}" in kept]
    assert [checkpoint.filename for checkpoint in saved] == [f"c{number}" for number in stay]
    assert removed == [f"c{number}" for number in range(count) if number not in stay]


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0.5, 1.0]), min_size=3, max_size=8))
def test_an_equal_score_replaces_the_oldest_of_the_worst_if_that_is_wanted(scores: list[float]) -> None:
    never, _ = save_all([1.0, *scores], scored=True, n_saved=1)
    assert never == [SavedCheckpoint(1.0, "c0")]
    always, _ = save_all([1.0, *scores], scored=True, n_saved=1, equal=True)
    newest = max(number for number, score in enumerate([1.0, *scores]) if score == 1.0)
    assert always == [SavedCheckpoint(1.0, f"c{newest}")]


def test_a_step_that_is_saved_again_replaces_its_first_checkpoint() -> None:
    saved = [SavedCheckpoint(4, "step-4"), SavedCheckpoint(8, "step-8.1f2e"), SavedCheckpoint(80, "step-80")]
    for name in ("step-8.1f2e", "step-8"):  # an object store adds another part for each save
        stay, removed = rotated(saved, SavedCheckpoint(8, name), scored=False, n_saved=3, keeps=lambda _: False)
        assert [checkpoint.filename for checkpoint in stay] == ["step-4", "step-80", name]
        assert removed == []
