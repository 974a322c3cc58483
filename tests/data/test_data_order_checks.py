"""Orders that are none, that remember, or that give wrong indices are refused in one line."""

import numpy as np
import pytest

from disttrain.data import Sequential, Shuffled, SlotBatchSampler
from disttrain.data.order_checks import identify, indices_at
from disttrain.errors import ConfigError, DisttrainError


class Custom:
    """An order of 50 positions whose indices a function gives."""

    def __init__(self, at, length=50):
        self.function, self.length = at, length

    def __len__(self):
        return self.length

    def at(self, epoch, positions):
        return self.function(epoch, positions)


def drawing():
    generator = np.random.default_rng(1)
    return lambda epoch, positions: generator.integers(0, 50, len(positions))


def counting():
    calls = []
    return lambda epoch, positions: calls.append(1) or (positions + len(calls)) % 50


WRONG = {
    "at.epoch=0, positions. raised TypeError: .*": lambda epoch, positions: positions + None,
    "at.epoch=1, positions. raised KeyError: 1": lambda epoch, positions: {0: positions}[epoch],
    r"to return integers of shape \(50,\), .* got int64 of shape \(49,\) from Custom": lambda e, p: p[1:],
    r"to return integers .* got float64 of shape \(50,\)": lambda epoch, positions: positions / 1,
    r"to return integers .* got bool of shape \(50,\)": lambda epoch, positions: positions > 3,
    r"to return integers .* got object of shape \(\)": lambda epoch, positions: None,
    r"an index in range\(50\), the samples of the data, got 50 at position 49 of epoch 0": lambda e, p: p + 1,
    r"an index in range\(50\), .* got -1 at position 0 of epoch 0": lambda epoch, positions: positions - 1,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_indices(message):
    with pytest.raises(ConfigError, match=message) as raised:
        identify(Custom(WRONG[message]), 50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("at", [drawing(), counting(), lambda e, p: np.cumsum(p) % 50, lambda e, p: np.arange(len(p))])
def test_an_order_that_depends_on_more_than_the_position(at):
    message = r"^order: expected one index at position \d+ of epoch 1, got \d+ and then \d+ from Custom; let it depend"
    with pytest.raises(ConfigError, match=message):
        identify(Custom(at), 50)


@pytest.mark.parametrize("other", [None, 3, range(5), [1, 2], Shuffled])
def test_objects_that_are_no_order(other):
    with pytest.raises(
        ConfigError, match=r"expected a function \(data, seed, global_batch_size\) that returns an object"
    ):
        identify(other, 50)


def test_an_order_without_positions():
    with pytest.raises(ConfigError, match="at least one position in an epoch, got a Custom of length 0"):
        identify(Custom(lambda epoch, positions: positions, 0), 50)


def test_a_failure_that_may_pass_is_no_mistake():
    def torn(epoch, positions):
        raise OSError("the disk is away")

    with pytest.raises(DisttrainError, match="raised OSError: the disk is away") as raised:
        identify(Custom(torn), 50)
    assert raised.value.exit_code == 1


def test_a_wrong_index_in_the_middle_of_a_run_is_found_there():
    def late(epoch, positions):
        return np.where((epoch == 7) & (positions == 13), 99, positions)

    sampler = SlotBatchSampler(50, 10, 2, order=Custom(late))
    sampler.samples(6, range(5))
    with pytest.raises(ConfigError, match="got 99 at position 13 of epoch 7"):
        sampler.batch(7, 1, 0)


def test_lists_tensors_and_small_integers_are_indices_too():
    positions = np.arange(6).reshape(2, 3)
    for kind in (list, lambda p: p.astype(np.uint8)):
        found = indices_at(Custom(lambda e, p, kind=kind: kind(p)), 50, 0, positions)
        assert found.dtype == np.int64
        assert found.tolist() == positions.tolist()


def test_an_identity_tells_orders_apart():
    def identity(order):
        return identify(order, 50)["order_fingerprint"]

    class Named(Custom):
        def fingerprint(self):
            return self.name

    one, two = Named(lambda epoch, positions: positions), Named(lambda epoch, positions: positions)
    one.name, two.name = "one", "two"
    orders = [Sequential(range(50)), Shuffled(range(50), 1), Shuffled(range(50), 2), one, two]
    assert len(set(map(identity, orders))) == 5
    assert identity(Shuffled(range(50), 1)) == identity(orders[1])
    assert identify(Sequential(range(50)), 50)["order_length"] == 50
