"""seed_for is a stable hash of its arguments, and the global generators are restored exactly."""

import hashlib
import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.seeding import (
    get_random_state,
    keep_random_state,
    manual_seed,
    random_state_kept,
    seed_for,
    set_random_state,
)


def draw() -> list[float]:
    """Draw from all three generators, and from their cached second gaussians."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def blake(text: bytes) -> int:
    """Return the first 63 of 64 bits of BLAKE2b, by hand: eight bytes, the least significant first."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return sum(byte << (8 * place) for place, byte in enumerate(digest)) // 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, "init"), b"0/4:init/"),
        ((7, "order", 3), b"7/5:order/3"),
        ((7, "batch", 3, 41, 2), b"7/5:batch/3/41/2"),
        ((2**63 - 1, "step", 10**12, 0), b"9223372036854775807/4:step/1000000000000/0"),
        ((1, "schön", 5), b"1/5:sch\xc3\xb6n/5"),
    ],
)
def test_seed_for_is_blake2b_of_the_arguments_as_text(arguments, text):
    assert seed_for(*arguments) == blake(text)


arguments = st.tuples(
    st.integers(0, 2**63 - 1), st.sampled_from(["init", "order", "batch", "step"]), st.lists(st.integers(0, 9))
)


@given(arguments, arguments)
def test_different_arguments_have_different_seeds(one, other):
    seeds = [seed_for(seed, purpose, *position) for seed, purpose, position in (one, other)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert (seeds[0] == seeds[1]) == (one == other)


def test_a_seed_is_not_the_next_seed_of_the_position_before():
    assert seed_for(0, "order", 1) != seed_for(1, "order", 0)
    assert seed_for(1, "step", 23, 4) != seed_for(1, "step", 2, 34)


@pytest.mark.parametrize("seed", [0, 56, 2**32, 2**63 - 1])
def test_manual_seed_seeds_all_three(seed):
    manual_seed(seed)
    first = draw()
    manual_seed(seed)
    assert draw() == first
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    assert draw() == first


def test_state_survives_a_weights_only_file_with_the_cached_gaussians():
    manual_seed(3)
    draw()  # an odd number of gaussians from python and numpy: each caches its second one
    file = io.BytesIO()
    torch.save(get_random_state(), file)
    expected = draw() + draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draw() + draw() == expected


def test_a_state_with_an_accelerator_loads_where_there_is_none():
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        manual_seed(3)
        torch.rand(1, device=device)
        state = get_random_state()
        expected = torch.rand(1, device=device)
        set_random_state(state)
        assert torch.equal(torch.rand(1, device=device), expected)
    else:
        state = get_random_state()
        expected = draw()
        set_random_state({**state, "accelerator": [torch.zeros(16, dtype=torch.uint8)]})
        assert draw() == expected


def test_keep_random_state_returns_the_functions_result_and_restores():
    @keep_random_state
    def disturb(base: int, *, factor: int) -> int:
        """Reseed everything."""
        manual_seed(12)
        draw()
        return base * factor

    manual_seed(1)
    expected = draw() + draw()
    manual_seed(1)
    before = draw()
    assert disturb(6, factor=7) == 42
    assert before + draw() == expected
    assert (disturb.__name__, disturb.__doc__) == ("disturb", "Reseed everything.")


def test_the_state_is_restored_when_the_function_raises():
    @keep_random_state
    def disturb() -> None:
        manual_seed(12)
        raise KeyError("on purpose")

    manual_seed(1)
    expected = draw()
    manual_seed(1)
    with pytest.raises(KeyError, match="on purpose"):
        disturb()
    assert draw() == expected


def test_random_state_kept_nests():
    manual_seed(1)
    expected = draw()
    manual_seed(1)
    with random_state_kept():
        manual_seed(2)
        inner = draw()
        manual_seed(2)
        with random_state_kept():
            draw()
        assert draw() == inner
    assert draw() == expected
