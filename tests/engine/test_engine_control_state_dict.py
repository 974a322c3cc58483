"""`state_dict` and `load_state_dict`."""

from types import MappingProxyType

import pytest
from recorded import recording_batches

from disttrain.engine import Events


def test_state_dict_of_a_fresh_engine_loads():
    engine, log = recording_batches()
    assert engine.state_dict() == {"epoch_length": None, "iteration": 0, "max_epochs": None}
    engine.load_state_dict(engine.state_dict())
    engine.run("ab")
    assert len(log) == 2


def test_state_dict_after_a_run():
    engine, _ = recording_batches()
    engine.run("abc", max_epochs=2)
    assert engine.state_dict() == {"epoch_length": 3, "iteration": 6, "max_epochs": 2}
    engine.state.max_epochs = None
    engine.run("abc", max_iters=4)
    assert engine.state_dict() == {"epoch_length": 3, "iteration": 4, "max_iters": 4}


def test_state_dict_holds_the_user_keys():
    engine, _ = recording_batches()
    engine.state_dict_user_keys.append("alpha")
    engine.state.alpha = 0.5
    saved = engine.state_dict()
    assert saved["alpha"] == 0.5
    other, _ = recording_batches()
    other.state_dict_user_keys.append("alpha")
    with pytest.raises(ValueError, match="alpha"):
        other.load_state_dict({"epoch_length": None, "iteration": 0, "max_epochs": None})
    other.load_state_dict(saved)
    assert other.state.alpha == 0.5


def test_loading_sets_iteration_epoch_and_limits():
    engine, _ = recording_batches()
    engine.load_state_dict({"iteration": 7, "epoch_length": 3, "max_iters": 20})
    state = engine.state
    assert (state.iteration, state.epoch, state.epoch_length) == (7, 2, 3)
    assert (state.max_epochs, state.max_iters) == (None, 20)
    engine.load_state_dict(MappingProxyType({"epoch": 2, "epoch_length": 3, "max_epochs": 4}))
    assert (state.iteration, state.epoch, state.epoch_length) == (6, 2, 3)
    assert (state.max_epochs, state.max_iters) == (4, None)


@pytest.mark.parametrize("wrong", [None, 3, "text", [("iteration", 0)]])
def test_a_state_dict_must_be_a_mapping(wrong):
    with pytest.raises(TypeError, match="mapping"):
        recording_batches()[0].load_state_dict(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "epoch_length"),
        ({"iteration": 0, "max_epochs": 3}, "epoch_length"),
        ({"epoch_length": 3, "max_epochs": 3}, "either iteration or epoch"),
        ({"epoch_length": 3, "max_epochs": 3, "iteration": 0, "epoch": 0}, "either iteration or epoch"),
        ({"epoch_length": 3, "iteration": 0}, "either max_epochs or max_iters"),
        ({"epoch_length": 3, "iteration": 0, "max_epochs": 3, "max_iters": 9}, "either max_epochs or max_iters"),
        ({"epoch_length": 3, "iteration": 7, "max_epochs": 2}, "maximum of at least the progress"),
        ({"epoch_length": 3, "epoch": 3, "max_epochs": 2}, "maximum of at least the progress"),
        ({"epoch_length": 3, "iteration": 7, "max_iters": 6}, "maximum of at least the progress"),
        ({"epoch_length": None, "epoch": 3, "max_epochs": 5}, "epoch_length"),
        ({"epoch_length": 0, "epoch": 3, "max_epochs": 5}, "epoch_length"),
        ({"epoch_length": -2, "iteration": 0, "max_epochs": 5}, "an epoch_length of at least 1, or None, got -2"),
        ({"epoch_length": 2.5, "iteration": 0, "max_epochs": 5}, "epoch_length must be a whole number, got 2.5"),
    ],
)
def test_a_state_dict_that_holds_too_little_or_too_much(wrong, message):
    engine, _ = recording_batches()
    before = dict(vars(engine.state))
    with pytest.raises(ValueError, match=message):
        engine.load_state_dict(wrong)
    assert vars(engine.state) == before


def test_saving_and_loading_at_every_iteration_gives_the_same_counters():
    engine, log = recording_batches()
    saved = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: saved.append(engine.state_dict()))
    engine.run("abc", max_epochs=3)
    for done, state_dict in enumerate(saved[:-1], start=1):
        other, rest = recording_batches()
        other.load_state_dict(state_dict)
        other.run("abc")
        assert [counters[:2] for counters in rest] == [counters[:2] for counters in log[done:]]


def test_the_length_0_of_data_without_a_batch_is_unknown():
    engine, log = recording_batches()
    engine.load_state_dict({"epoch_length": 0, "iteration": 0, "max_epochs": 3})
    engine.run("ab")
    assert (len(log), engine.state.epoch_length, engine.state.max_epochs) == (6, 2, 3)


def test_data_that_begins_anew_inside_an_epoch_is_logged(caplog):
    engine, log = recording_batches()
    engine.load_state_dict({"epoch_length": 3, "iteration": 4, "max_epochs": 2})
    engine.run("abc")
    assert [batch for _, _, batch in log] == ["a", "b"]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "inside epoch 2, at iteration 4, and takes its data from the beginning; a DeterministicEngine" in message
    caplog.clear()
    engine.run("abc", max_epochs=3)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
