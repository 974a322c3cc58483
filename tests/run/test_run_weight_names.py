"""Names of stored weights are paired with those of a model by one rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import ConfigError
from disttrain.run.weight_names import is_listed, pair_names, renamed, renaming_that_fits


def test_names_are_renamed_and_skipped() -> None:
    stored = ["encoder.0.weight", "encoder.1.weight", "fc.weight", "fc.bias"]
    wanted = ["backbone.0.weight", "backbone.1.weight", "backbone.1.lora_a", "head.weight"]
    pairs = pair_names(stored, wanted, {"encoder.": "backbone."}, ("head.", "*.lora_*"))
    assert pairs.taken == {"backbone.0.weight": "encoder.0.weight", "backbone.1.weight": "encoder.1.weight"}
    assert pairs.skipped == ["backbone.1.lora_a", "head.weight"]
    assert pairs.missing == []
    assert pairs.left_over == ["fc.weight", "fc.bias"]
    assert pair_names(stored, wanted, {}, ()).missing == wanted


def test_a_skipped_name_that_is_there_is_not_left_over() -> None:
    pairs = pair_names(["a", "head.a"], ["a", "head.a"], {}, ("head",))
    assert (pairs.taken, pairs.skipped, pairs.left_over) == ({"a": "a"}, ["head.a"], [])


def test_the_longest_beginning_counts() -> None:
    rename = {"": "net.", "a.": "b.", "a.x.": "c."}
    assert [renamed(name, rename) for name in ("a.x.w", "a.w", "w")] == ["c.w", "b.w", "net.w"]


def test_mistakes_in_rename_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^init_from\.rename: expected the beginning of a name that is there, got 'x'"
    ):
        pair_names(["a.w"], ["a.w"], {"x": "y"}, ())
    with pytest.raises(ConfigError, match=r"a\.w and b\.w both become b\.w"):
        pair_names(["a.w", "b.w"], ["b.w"], {"a.": "b."}, ())


def test_a_renaming_that_would_fit_is_found() -> None:
    assert renaming_that_fits(["0.weight"], ["other", "module.0.weight"]) == ({"module.": ""}, 1)
    assert renaming_that_fits(["net.0.weight"], ["0.weight"]) == ({"": "net."}, 1)
    assert renaming_that_fits(["0.weight"], ["1.weight"]) is None
    assert renaming_that_fits([], ["1.weight"]) is None


def test_the_renaming_is_that_by_which_most_names_are_found() -> None:
    base = ["h.0.weight", "h.1.weight", "wte.weight"]
    head = ["lm_head.weight", "transformer.h.0.weight", "transformer.h.1.weight", "transformer.wte.weight"]
    assert renaming_that_fits(head, base) == ({"": "transformer."}, 3)
    assert renaming_that_fits(base, head) == ({"transformer.": ""}, 3)
    assert renaming_that_fits(["a.b.w", "a.c.w", "v"], ["b.w", "c.w", "x.v"]) == ({"": "a."}, 2)


NAMES = st.lists(st.text("ab.", min_size=1, max_size=4), unique=True, max_size=6)


@given(NAMES, NAMES, st.lists(st.sampled_from(["a", "b.", "*a", "?b"]), max_size=2))
def test_every_name_is_in_one_place(stored: list[str], wanted: list[str], skip: list[str]) -> None:
    pairs = pair_names(stored, wanted, {}, skip)
    assert sorted([*pairs.taken, *pairs.skipped, *pairs.missing]) == sorted(wanted)
    assert all(is_listed(name, skip) for name in pairs.skipped)
    assert set(pairs.taken.values()) | set(pairs.left_over) <= set(stored)
    assert set(pairs.taken) == {name for name in wanted if name in stored and not is_listed(name, skip)}
