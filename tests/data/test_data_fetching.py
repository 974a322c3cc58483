"""The worker processes of the loaders end when they should, and a dead worker is an error of one message."""

import gc
import itertools
import multiprocessing
import os
import signal

import pytest
from augmented_data import (
    NUM_SAMPLES,
    NUM_STEPS,
    Augmented,
    Deadly,
    ended,
    loaded_by,
    loader_of,
    sampler_of,
    take,
)

from disttrain.data import SlotLoader, evaluation_loader
from disttrain.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_a_worker_that_is_killed_is_an_error_of_one_message():
    loader = SlotLoader(Deadly(NUM_SAMPLES), sampler_of(), num_workers=1)
    with pytest.raises(DataError, match=r"^a data loading worker ended, .* use fewer workers or smaller batches$"):
        take(loader, 2 * NUM_STEPS)


class Tied:
    """Garbage in a cycle that kills a forked process which collects it, as a connection to other ranks can."""

    def __init__(self):
        self.cycle = self
        self.process = os.getpid()

    def __del__(self):
        if os.getpid() != self.process:
            os.kill(os.getpid(), signal.SIGKILL)


class Collecting(Augmented):
    """Collects garbage with each sample."""

    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


@pytest.mark.parametrize("collecting", [True, False])
def test_workers_leave_their_parents_garbage_alone(collecting):
    gc.disable()
    try:
        Tied()
        if collecting:
            gc.enable()
        loader = SlotLoader(Collecting(NUM_SAMPLES), sampler_of(), num_workers=2)
        assert take(loader, 2) == take(loader_of(), 2)
        assert gc.isenabled() is collecting
        loader.close()
    finally:
        gc.enable()
        gc.collect()  # in this process it is harmless


def test_an_evaluation_that_is_left_ends_its_workers():
    batches = evaluation_loader(Augmented(23), 2, num_workers=2)
    next(batches)
    workers = {child.pid for child in multiprocessing.active_children()}
    batches.close()
    assert len(workers) == 2
    assert ended(workers)
    with pytest.raises(DataError, match="the evaluation dataset is empty"):
        evaluation_loader(Augmented(0), 2)


def hold_loader(pipe, context):
    """Run in a process of its own: load a step, send the ids of the workers, and do both again for each message."""
    os.setsid()
    interrupts = []
    signal.signal(signal.SIGINT, lambda signum, frame: interrupts.append(signum))
    signal.signal(signal.SIGTERM, lambda signum, frame: interrupts.append(signum))
    multiprocessing.set_start_method(context, force=True)  # of this process, from which the workers get theirs
    loader = loader_of(num_workers=2)
    steps = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    workers = loaded_by(next(steps))
    while True:
        pipe.send((workers, len(interrupts)))
        if pipe.recv() == "exit":
            return
        for _ in range(NUM_STEPS):  # more than was fetched ahead
            workers = loaded_by(next(steps))


@pytest.mark.parametrize(("context", "end"), [("fork", "exit"), ("fork", "kill"), ("forkserver", "kill")])
def test_workers_leave_signals_to_the_parent_and_end_with_it(context, end):
    pipe, other = multiprocessing.Pipe()
    # Not forked for "forkserver": it would inherit this process's fork server, and multiprocessing fails with that.
    start = "fork" if context == "fork" else "spawn"
    process = multiprocessing.get_context(start).Process(target=hold_loader, args=(other, context))
    process.start()
    try:
        other.close()
        workers, _ = pipe.recv()
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, signum)
        for pid in workers:
            os.kill(pid, signal.SIGUSR1)
        pipe.send("go on")
        assert pipe.recv() == (workers, 2)
        assert len(workers) == 2
        if end == "exit":
            pipe.send("exit")
        else:
            process.kill()
        process.join(20)
        assert process.exitcode == (0 if end == "exit" else -signal.SIGKILL)
        assert ended(workers)
    finally:
        process.kill()
        process.join()
