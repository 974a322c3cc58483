"""Events that are fired by hand, and events that a program registers."""

import pytest

from disttrain.engine import Engine, EventEnum, Events


class Mine(EventEnum):
    LOSS = "loss"
    STARTED = "started"


class Theirs(EventEnum):
    LOSS = "loss"


def idle():
    return Engine(lambda engine, batch: None)


def test_fire_event_calls_the_handlers_whose_filters_pass_now():
    engine, seen = idle(), []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("all"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: seen.append("third"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: seen.append("fourth"))
    for engine.state.iteration in (3, 4, 4, 3):
        engine.fire_event(Events.ITERATION_COMPLETED)
    assert seen == ["all", "third", "all", "fourth", "all", "fourth", "all", "third"]
    assert engine.last_event_name is Events.ITERATION_COMPLETED
    seen.clear()
    engine.run(range(4))
    engine.fire_event(Events.ITERATION_COMPLETED)
    assert seen == ["all", "all", "all", "third", "all", "fourth", "all", "fourth"]


def test_registered_events():
    engine = idle()
    assert all(engine.has_registered_events(event) for event in Events)
    assert engine.has_registered_events(Events.STARTED(every=2))
    assert not engine.has_registered_events("loss")
    engine.register_events("loss", Mine.LOSS, "other")
    assert engine.has_registered_events("loss")
    assert engine.has_registered_events(Mine.LOSS)
    assert not engine.has_registered_events(Theirs.LOSS)
    assert not idle().has_registered_events(Mine.LOSS)
    assert not engine.has_registered_events([])


def test_custom_events_fire():
    engine, seen = idle(), []
    engine.register_events("after", Mine.LOSS)
    engine.add_event_handler("after", lambda e: seen.append("after"))
    engine.add_event_handler(Mine.LOSS | Events.STARTED, lambda e: seen.append(e.last_event_name))

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.fire_event(Mine.LOSS)
        engine.fire_event("after")

    engine.run([1])
    assert seen == [Events.STARTED, Mine.LOSS, "after"]


@pytest.mark.parametrize("wrong", [3, None, object(), ("a", "b")])
def test_a_name_to_register_is_a_str_or_an_event_enum(wrong):
    with pytest.raises(TypeError, match="str or an EventEnum"):
        idle().register_events(wrong)


@pytest.mark.parametrize("wrong", ["losses", [Mine.LOSS], 3])
def test_event_to_attr_is_a_dict(wrong):
    with pytest.raises(ValueError, match="dict"):
        idle().register_events(Mine.LOSS, event_to_attr=wrong)


def test_mapped_attributes_start_at_0_and_filters_go_by_them():
    engine, seen = idle(), []
    engine.register_events(Mine.LOSS, "after", event_to_attr={Mine.LOSS: "losses", "after": "afters"})
    assert engine.state.losses == engine.state.afters == 0
    engine.add_event_handler(Mine.LOSS(every=3), lambda e: seen.append(e.state.losses))
    engine.add_event_handler(Mine.LOSS(once=[4, 2]), lambda e: seen.append(e.state.losses))
    for engine.state.losses in (1, 2, 3, 4, 3, 2, 6):
        engine.fire_event(Mine.LOSS)
    assert seen == [2, 3, 4, 3, 2, 6]


def test_mapped_attribute_that_exists_keeps_its_value():
    engine = idle()
    engine.state.losses = 7
    engine.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    assert engine.state.losses == 7


def test_mapping_survives_a_new_state():
    engine, seen = idle(), []
    engine.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    engine.state = type(engine.state)()
    engine.add_event_handler(Mine.LOSS(every=2), lambda e: seen.append(e.state.losses))

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.state.losses += 1
        engine.fire_event(Mine.LOSS)

    engine.run(range(4))
    assert seen == [2, 4]


def test_filter_on_an_event_without_an_attribute_is_an_error_when_it_fires():
    engine = idle()
    engine.register_events(Mine.LOSS)
    engine.add_event_handler(Mine.LOSS(every=2), print)
    engine.add_event_handler(Events.TERMINATE(event_filter=lambda e, v: True), print)
    with pytest.raises(RuntimeError, match="attribute of the state"):
        engine.fire_event(Mine.LOSS)
    with pytest.raises(RuntimeError, match="attribute of the state"):
        engine.run([1, 2, 3], max_iters=2)


def test_two_enums_events_of_one_name_do_not_collide():
    engine, seen = idle(), []
    engine.register_events(*Mine, event_to_attr={Mine.LOSS: "mine"})
    engine.register_events(*Theirs, event_to_attr={Theirs.LOSS: "theirs"})
    for event in (Mine.LOSS(every=2), Theirs.LOSS(every=3), Mine.STARTED, Events.STARTED):
        engine.add_event_handler(event, seen.append, event)
    engine.state.mine, engine.state.theirs = 2, 3
    for event in (Mine.LOSS, Theirs.LOSS, Mine.STARTED, Events.STARTED):
        engine.fire_event(event)
        assert seen.pop() == event
        assert seen == []


def test_one_engines_mapping_never_leaks_into_anothers():
    one, other = idle(), idle()
    one.register_events(Mine.LOSS, event_to_attr={Mine.LOSS: "losses"})
    other.register_events(Mine.LOSS)
    assert not hasattr(other.state, "losses")
    with pytest.raises(RuntimeError):
        other.state.get_event_attrib_value(Mine.LOSS)
