"""The state of a run."""

import pytest

from disttrain.engine import Engine, EventEnum, Events, State


class Mine(EventEnum):
    LOSS = "loss"


def test_state_starts_with_these_attributes():
    state = State()
    assert (state.iteration, state.epoch, state.metrics) == (0, 0, {})
    for name in ("epoch_length", "max_epochs", "max_iters", "output", "batch", "dataloader", "seed"):
        assert getattr(state, name) is None
    assert set(state.times) == {Events.EPOCH_COMPLETED, Events.COMPLETED}


def test_state_takes_any_attribute():
    state = State(iteration=5, epoch_length=3, alpha=0.5)
    state.beta = [1]
    assert (state.iteration, state.epoch_length, state.alpha, state.beta) == (5, 3, 0.5, [1])


def test_states_do_not_share_what_they_hold():
    one, other = State(), State()
    one.metrics["accuracy"] = 1.0
    one.event_to_attr["x"] = "y"
    one.times[Events.COMPLETED] = 3.0
    assert other.metrics == {}
    assert "x" not in other.event_to_attr
    assert other.times[Events.COMPLETED] is None


def test_missing_attribute_is_an_attribute_error():
    assert not hasattr(State(), "alpha")
    with pytest.raises(AttributeError, match="alpha"):
        State().alpha


@pytest.mark.parametrize(
    "name", ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"]
)
def test_events_valued_by_the_iteration(name):
    state = State(iteration=12, epoch=3)
    assert state.get_event_attrib_value(name) == 12
    assert state.get_event_attrib_value(Events[name]) == 12
    assert state.get_event_attrib_value(Events[name](every=2)) == 12
    assert state.event_to_attr[Events[name]] == "iteration"


@pytest.mark.parametrize("name", ["EPOCH_STARTED", "EPOCH_COMPLETED", "STARTED", "COMPLETED"])
def test_events_valued_by_the_epoch(name):
    assert State(iteration=12, epoch=3).get_event_attrib_value(Events[name]) == 3


@pytest.mark.parametrize("event", [Events.TERMINATE, Events.EXCEPTION_RAISED, Mine.LOSS, "nothing", 3])
def test_an_event_without_an_attribute_has_no_value(event):
    with pytest.raises(RuntimeError, match="attribute of the state"):
        State().get_event_attrib_value(event)


def test_custom_event_has_its_own_attribute():
    engine = Engine(lambda engine, batch: None)
    engine.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    engine.state.losses = 4
    assert engine.state.get_event_attrib_value(Mine.LOSS) == 4


def test_repr_lists_the_attributes_and_types_where_not_scalar():
    text = repr(State(iteration=7, output=[1, 2], name="x", rate=0.5, batch=object()))
    assert text.startswith("State:\n")
    for line in ("iteration: 7", "epoch: 0", "max_epochs: None", "output: <class 'list'>", "name: x", "rate: 0.5"):
        assert f"\t{line}\n" in text
    assert "batch: <class 'object'>" in text
