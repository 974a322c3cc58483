"""An engine that records the events it fires, for the tests of its stops."""

from disttrain.engine import Engine, Events

IN_AN_ITERATION = [
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
]
INSIDE = [Events.STARTED, Events.EPOCH_STARTED, *IN_AN_ITERATION, Events.EPOCH_COMPLETED]
RECORDED = [*INSIDE, *(e for e in Events if e not in INSIDE and e is not Events.EXCEPTION_RAISED)]


def recording(process=lambda engine, batch: None):
    """Return an engine and the list of the events it fires and the batches it processes."""
    log = []

    def step(engine, batch):
        log.append(batch)
        process(engine, batch)

    engine = Engine(step)
    for event in RECORDED:
        engine.add_event_handler(event, lambda engine, name=event.name, iter_counter=None: log.append(name))
    return engine, log


def recording_batches():
    """Return an engine and the list of (epoch, iteration, batch) it processes."""
    log = []
    return Engine(lambda engine, batch: log.append((engine.state.epoch, engine.state.iteration, batch))), log


def at(engine, event, number, action):
    """Call `action(engine)` at the firing of the event with this number, from 1."""
    num_fired = 0

    def count(engine, iter_counter=None):
        nonlocal num_fired
        num_fired += 1
        if num_fired == number:
            action(engine)

    engine.add_event_handler(event, count)


def log_of(run):
    """Return the log of a run without a stop."""
    engine, log = recording()
    run(engine)
    return log
