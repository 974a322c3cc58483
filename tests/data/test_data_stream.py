"""StreamLoader gives the same bits on any workers and ranks, resumed at any step by states or by reading again."""

import copy
import itertools
import os
import pickle
import random
import re

import numpy as np
import pytest
import torch
from augmented_data import random_state
from streamed_data import (
    GLOBAL_BATCH_SIZE,
    KINDS,
    NUM_SLOTS,
    SIZES,
    Deadly,
    Iterators,
    Numbers,
    Remembering,
    RememberingShards,
    Shards,
    Shuffling,
    content,
    steps_of,
    stream_loader,
    take_steps,
)
from torch.utils.data import get_worker_info

from disttrain.data import LoadingError, Seekable, StepBatch, StreamLoader
from disttrain.engine.deterministic import DeterministicEngine
from disttrain.errors import ConfigError, DataError, RemoteError
from disttrain.seeding import seed_for

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
COUNT = 9  # steps: three passes of the shards, or more than two of the whole stream


def numbers_of(batch):
    return [[number for _, number in x.tolist()] for x, _, _ in batch]


def digest(microbatch):
    """Return the samples of a microbatch as text, without the ids of the reading processes."""
    return repr([part.tolist() for part in microbatch[:2]])


def saved_at(loader, step):
    """Return a copy of the loader's state after `step` steps, as a checkpoint holds it."""
    take_steps(loader, step)
    return pickle.loads(pickle.dumps(loader.state_dict()))


def loaded(loader, state):
    loader.load_state_dict(copy.deepcopy(state))
    return loader


@pytest.fixture(scope="module")
def reference():
    """Return the steps of each kind of stream, read in one process without a stop."""
    return {kind: take_steps(stream_loader(kind()), COUNT + 2) for kind in KINDS}


class TestWhatAStepHolds:
    def test_of_shards(self):
        steps = itertools.islice(steps_of(stream_loader(Shards())), 7)
        starts = [sum(SIZES[:slot]) for slot in range(NUM_SLOTS)]
        for epoch, step in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]:
            batch = next(steps)
            assert isinstance(batch, StepBatch)
            assert (batch.epoch, batch.step, batch.slots) == (epoch, step, range(NUM_SLOTS))
            assert numbers_of(batch) == [[start + 2 * step, start + 2 * step + 1] for start in starts]
            assert {epoch for x, _, _ in batch for epoch in x[:, 0].tolist()} == {epoch}

    def test_of_a_whole_stream(self):
        steps = itertools.islice(steps_of(stream_loader(Numbers())), 6)
        for epoch, step in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]:
            batch = next(steps)
            assert (batch.epoch, batch.step) == (epoch, step)
            numbers = range(step * GLOBAL_BATCH_SIZE, (step + 1) * GLOBAL_BATCH_SIZE)
            assert list(itertools.chain.from_iterable(numbers_of(batch))) == list(numbers)

    @pytest.mark.parametrize("kind", [Shards, Numbers])
    def test_what_is_drawn_is_a_function_of_the_position(self, kind):
        for batch in itertools.islice(steps_of(stream_loader(kind())), 5):
            for slot, (_, draws, _) in enumerate(batch):
                seed = seed_for(3, "batch", batch.epoch, batch.step, slot)
                random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
                expected = [
                    [random.random(), np.random.random(), torch.rand(()).item(), np.random.normal()] for _ in draws
                ]
                assert draws.tolist() == expected

    def test_a_shuffling_stream_is_shuffled_another_way_in_each_pass(self, reference):
        orders = [[x for _, _, step in reference[Shuffling][i : i + 3] for x in step] for i in (0, 3, 6)]
        numbers = [[number for xs, _ in order for _, number in xs] for order in orders]
        assert len({tuple(order) for order in numbers}) == 3
        assert all(len(set(order)) == len(order) for order in numbers)


class TestAnyLayoutGivesTheSame:
    @each_kind
    def test_workers(self, kind, reference):
        assert take_steps(stream_loader(kind(), num_workers=3), COUNT) == reference[kind][:COUNT]

    def test_one_worker_and_as_many_as_slots(self, reference):
        for num_workers in (1, 4):
            assert take_steps(stream_loader(Shuffling(), num_workers=num_workers), 7) == reference[Shuffling][:7]

    @pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (3, 0), (4, 0)])
    def test_ranks(self, ranks, world_size, num_workers, reference):
        together = ranks(world_size, read_each, num_workers)
        for number, kind in enumerate(KINDS):
            assert joined([of_one[number] for of_one in together]) == reference[kind][:7], kind

    @pytest.mark.parametrize("kind", [Shuffling, RememberingShards, Remembering])
    def test_a_state_of_three_ranks_on_two_and_on_one(self, ranks, kind, reference):
        states = ranks(3, save, kind, 4)
        assert [digestible(state) for state in states] == [digestible(states[0])] * 3
        assert joined(ranks(2, read, kind, 1, states[0], 3)) == reference[kind][4:7]
        assert take_steps(loaded(stream_loader(kind(), digest=digest), states[0]), 5) == reference[kind][4:9]


def of_rank(backend, kind, **options):
    slots = range(NUM_SLOTS * backend.rank // backend.world_size, NUM_SLOTS * (backend.rank + 1) // backend.world_size)
    return stream_loader(kind(), slots, ranks=backend, digest=digest, **options)


def read(backend, kind, num_workers=0, state=None, count=COUNT):
    loader = of_rank(backend, kind, num_workers=num_workers)
    if state is not None:
        loader.load_state_dict(state)
    steps = take_steps(loader, count)
    loader.close()
    return steps


def read_each(backend, num_workers):
    return [read(backend, kind, num_workers, None, 7) for kind in KINDS]


def save(backend, kind, step):
    return saved_at(of_rank(backend, kind), step)


def joined(shares):
    """Return the steps of all ranks, joined to the steps of one rank."""
    together = []
    for parts in zip(*shares, strict=True):
        assert len({part[:2] for part in parts}) == 1
        together.append((*parts[0][:2], [batch for part in parts for batch in part[2]]))
    return together


def digestible(state):
    return repr(state)


class TestResuming:
    @each_kind
    def test_from_every_step_by_what_was_saved(self, kind, reference):
        for step in range(1, COUNT):
            state = saved_at(stream_loader(kind(), digest=digest), step)
            assert (
                take_steps(loaded(stream_loader(kind(), digest=digest), state), 2) == reference[kind][step : step + 2]
            )

    @each_kind
    def test_every_step_counted_from_the_start(self, kind, reference):
        for step in range(COUNT):
            loader = stream_loader(kind())
            loader.seek(0, step)
            assert take_steps(loader, 2) == reference[kind][step : step + 2]
            assert loader.iteration == step + 2

    @pytest.mark.parametrize("kind", [Shuffling, Iterators])
    def test_in_workers(self, kind, reference):
        for step in (2, 4):
            state = saved_at(stream_loader(kind(), num_workers=2, digest=digest), step)
            got = take_steps(loaded(stream_loader(kind(), num_workers=3, digest=digest), state), 3)
            assert got == reference[kind][step : step + 3]

    def test_within_a_pass_and_beyond_its_end(self, reference):
        loader = stream_loader(Shuffling())
        loader.seek(1, 2)
        assert take_steps(loader, 1) == reference[Shuffling][5:6]
        assert (loader.epoch, loader.step) == (2, 0)
        loader.seek(1, 4)  # the pass has three steps
        assert (loader.epoch, loader.step) == (1, 4)
        loader.catch_up()
        assert (loader.epoch, loader.step) == (2, 1)
        assert take_steps(loader, 1) == reference[Shuffling][7:8]
        with pytest.raises(ValueError, match="epoch=-1"):
            loader.seek(-1, 0)

    def test_a_state_reads_nothing_again(self):
        state = saved_at(stream_loader(RememberingShards()), 5)
        RememberingShards.drawn = 0
        shown = []
        loader = loaded(stream_loader(RememberingShards()), state)
        loader.catch_up(lambda done, total: shown.append(done))
        assert RememberingShards.drawn == GLOBAL_BATCH_SIZE
        assert shown == []

    def test_without_one_what_lies_before_is_read_and_told(self, caplog):
        loader = loaded(stream_loader(Shards()), saved_at(stream_loader(Shards()), 5))
        assert (loader.epoch, loader.step, loader.iteration) == (1, 2, 5)
        shown = []
        loader.catch_up(lambda done, total: shown.append((done, total)))
        assert shown == [(0, 2), (1, 2), (2, 2)]
        assert "2 steps of the training data are read and dropped, from the start of pass 1" in caplog.text
        assert "a stream with state_dict() and load_state_dict(state) resumes at once" in caplog.text
        assert (loader.epoch, loader.step, loader.iteration) == (1, 2, 5)

    def test_an_engine_goes_on_by_its_iteration_alone(self, reference):
        record = []
        engine = DeterministicEngine(lambda engine, batch: record.append(content(batch)))
        engine.load_state_dict({"iteration": 4, "epoch_length": None, "max_iters": 8, "rng_states": None})
        engine.run(stream_loader(Shuffling()))
        assert record == reference[Shuffling][4:8]

    def test_a_state_is_that_of_its_step_whatever_is_read_on(self, reference):
        loader = stream_loader(Iterators(), num_workers=2)
        steps = steps_of(loader)
        states = [loader.state_dict() for _ in itertools.islice(steps, 6)]
        loader.close()
        for step, state in enumerate(states, start=1):
            assert take_steps(loaded(stream_loader(Iterators()), state), 1) == reference[Iterators][step : step + 1]


class TestThePosition:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_is_what_was_yielded(self, num_workers):
        loader = stream_loader(Shards(), range(1, 3), num_workers=num_workers)  # shards of 7 and 12
        assert isinstance(loader, Seekable)
        for epoch in range(2):
            for step, batch in enumerate(loader):
                assert (batch.epoch, batch.step, batch.slots, len(batch)) == (epoch, step, range(1, 3), 2)
                assert (loader.epoch, loader.step) == ((epoch, step + 1) if step < 2 else (epoch + 1, 0))
        loader.close()

    @pytest.mark.parametrize("kind", [Shards, Remembering])
    def test_a_pass_that_was_left_or_closed_goes_on_where_it_was(self, kind, reference):
        loader = stream_loader(kind(), num_workers=1)
        first = [content(batch) for batch in itertools.islice(loader, 1)]
        second = [content(batch) for batch in itertools.islice(loader, 1)]
        loader.close()
        assert first + second + take_steps(loader, 5) == reference[kind][:7]

    def test_an_interrupt_while_reading_ahead_loses_no_step(self, reference):
        class Interrupted(Shards):
            once = True

            def sample(self, number):
                if number == 4 and Interrupted.once:
                    Interrupted.once = False
                    raise KeyboardInterrupt
                return super().sample(number)

        loader = stream_loader(Interrupted())
        got = take_steps(loader, 1)
        with pytest.raises(KeyboardInterrupt):
            take_steps(loader, 1)
        assert (loader.epoch, loader.step) == (0, 1)
        assert got + take_steps(loader, 3) == reference[Shards][:4]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_global_generators_are_left_as_found(self, num_workers):
        before = random_state()
        take_steps(stream_loader(Shuffling(), num_workers=num_workers), 4)
        assert random_state() == before


class Asking(Shards):
    """Shards itself by the worker, as Hugging Face's streams do."""

    def numbers(self):
        info = get_worker_info()
        return super().numbers() if info is None else super().numbers()[info.id :: info.num_workers]


def test_a_stream_that_asks_for_its_worker_reads_all_it_was_given(reference):
    assert take_steps(stream_loader(Asking(), num_workers=3), 4) == reference[Shards][:4]


class TestErrors:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("kind", [Shards, Numbers])
    def test_a_bad_sample_is_named_in_its_turn(self, kind, num_workers, reference):
        loader = stream_loader(kind(bad=19), num_workers=num_workers)
        good = 1 if kind is Shards else 2  # 19 is in shard 2 (from 16), and in the step from 16
        name = "epoch=0, step=1, slot=2" if kind is Shards else "epoch=0, step=2, slot=1"
        message = (
            rf"the stream raised ValueError: bad pixels \(\S+:\d+ in sample\), making sample 1 of the microbatch of "
            f"{name}; repair that sample or leave it out"
        )
        steps = steps_of(loader)
        assert [content(batch) for batch in itertools.islice(steps, good)] == reference[kind][:good]
        for _ in range(2):
            with pytest.raises(LoadingError) as caught:
                next(steps_of(loader))
            assert re.fullmatch(message, str(caught.value))
            assert (loader.epoch, loader.step) == (0, good)

    def test_a_worker_that_is_killed(self):
        loader = stream_loader(Deadly(), num_workers=1)  # 13 is in shard 1 (from 9), in its third step
        steps = steps_of(loader)
        assert [batch.step for batch in itertools.islice(steps, 2)] == [0, 1]
        with pytest.raises(DataError, match=r"^a data loading worker ended, .* use fewer workers or smaller batches$"):
            next(steps)

    def test_a_batch_that_cannot_be_collated(self):
        def uncollatable(samples):
            raise RuntimeError("stack expects each tensor to be equal size")

        with pytest.raises(LoadingError, match=r"^uncollatable raised .* of epoch=0, step=0, slot=0; give all samples"):
            next(iter(stream_loader(Shards(), collate_fn=uncollatable)))

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (Numbers((0,)), r"at least 8 samples \(one step\), got 0; check that its files were found"),
            (Numbers((5,)), r"at least 8 samples \(one step\), got 5; use more data or a smaller global_batch_size"),
            (
                Shards((9, 0, 1, 9)),
                r"at least 2 samples .* in each shard, got 0 in shard 1 of 4 and too few in 1 more;",
            ),
            (Shards((9, 9, 9, 1)), r".*, got 1 in shard 3 of 4; cut the data into even shards, or use fewer slots"),
        ],
    )
    def test_a_pass_without_a_step(self, dataset, message):
        with pytest.raises(DataError, match=f"^pass 0 of the training data has no step: expected {message}"):
            next(iter(stream_loader(dataset)))

    def test_a_stream_that_can_be_read_only_once(self):
        class Once(Numbers):
            def __init__(self):
                super().__init__()
                self.iterator = super().__iter__()

            def __iter__(self):
                return self.iterator

        with pytest.raises(DataError, match=r"^pass 1 .* got 0; each iter\(\) of it must begin anew$"):
            take_steps(stream_loader(Once()), 5)

    def test_every_rank_says_the_same_of_one_ranks_shard(self, ranks):
        errors = [outcome.error for outcome in ranks.outcomes(3, read, ShortShards)]
        own = {str(error) for error in errors if isinstance(error, DataError)}
        assert len(own) == 1
        # A rank that has not raised its own error yet receives the first rank's.
        received = [error.message for error in errors if isinstance(error, RemoteError)]
        assert set(received) <= {f"DataError: {message}" for message in own}
        assert len(received) + sum(isinstance(error, DataError) for error in errors) == 3
        assert "got 1 in shard 3 of 4" in own.pop()

    def test_shards_that_cannot_be_made(self):
        class Two(Shards):
            def shard(self, num_shards, index):
                if num_shards > 2:
                    raise IndexError("only 2 files")
                return self

        with pytest.raises(
            LoadingError,
            match=r"^train_data.shard\(4, 0\) raised IndexError: only 2 files \(.* in shard\), .* num_slots",
        ):
            next(iter(stream_loader(Two())))

    def test_a_state_that_no_checkpoint_can_hold(self):
        class Numpy(Remembering):
            def state_dict(self):
                return {"at": [np.int64(self.at)]}

        with pytest.raises(
            LoadingError, match=r"^the stream's state\['at'\]\[0\] is of type numpy.int64, which a check"
        ):
            next(iter(stream_loader(Numpy())))

    def test_slots_that_do_not_fit(self):
        with pytest.raises(ConfigError, match="global_batch_size=8 cannot be cut into num_slots=3"):
            StreamLoader(Shards(), 8, 3)


class ShortShards(Shards):
    def __init__(self, sizes=(9, 9, 9, 1), *more):
        super().__init__(sizes, *more)


class Forgetful(RememberingShards):
    """Shuffles in a buffer that is not part of its state."""

    def __iter__(self):
        buffer = []
        for sample in super().__iter__():
            buffer.append(sample)
            if len(buffer) > 2:
                yield buffer.pop(random.randrange(3))
        yield from buffer


class TestOtherData:
    def test_a_state_that_does_not_bring_the_samples_back_is_not_used(self, caplog):
        long = Forgetful((20, 20, 20, 20))
        expected = take_steps(stream_loader(long), 5)
        state = saved_at(stream_loader(long, digest=digest), 2)
        assert take_steps(loaded(stream_loader(long), state), 1) != expected[2:3]  # without digests nothing is compared
        assert take_steps(loaded(stream_loader(long, digest=digest), state), 3) == expected[2:]
        assert "does not bring back the samples that came next" in caplog.text

    def test_nor_is_one_that_brings_too_few_back(self, caplog):
        expected = take_steps(stream_loader(Forgetful()), 4)
        state = saved_at(stream_loader(Forgetful()), 2)
        assert take_steps(loaded(stream_loader(Forgetful()), state), 2) == expected[2:]
        assert "does not bring back the samples that came next" in caplog.text

    def test_all_ranks_go_round_it_together(self, ranks):
        state = saved_at(stream_loader(Forgetful(), digest=digest), 1)
        expected = take_steps(stream_loader(Forgetful()), 4)
        assert joined(ranks(3, read, Forgetful, 0, state, 3)) == expected[1:]

    def test_other_samples_are_an_error_unless_they_are_accepted(self):
        state = saved_at(stream_loader(Shards(), digest=digest), 1)
        other = Shards((9, 7, 11, 9))  # the last shard begins one sample earlier
        with pytest.raises(DataError, match="step 1 of pass 0 has other samples than before, in slot 3; restore the"):
            take_steps(loaded(stream_loader(other, digest=digest), state), 1)
        accepting = loaded(stream_loader(other, digest=digest, accept_other_data=True), state)
        assert [step[:2] for step in take_steps(accepting, 3)] == [(0, 1), (0, 2), (1, 0)]

    @pytest.mark.parametrize("kind", [Shards, RememberingShards])
    def test_a_pass_that_has_become_shorter(self, kind):
        state = saved_at(stream_loader(kind((9, 9, 9, 9)), digest=digest), 3)
        shorter = kind((9, 9, 9, 6))
        with pytest.raises(
            DataError, match="pass 0 ends after 3 steps, expected more than 3, as before; restore the data"
        ):
            take_steps(loaded(stream_loader(shorter, digest=digest), state), 1)
        accepting = loaded(stream_loader(shorter, digest=digest, accept_other_data=True), state)
        assert [step[:2] for step in take_steps(accepting, 2)] == [(1, 0), (1, 1)]

    def test_a_stream_that_has_lost_its_shards_or_its_state(self):
        state = saved_at(stream_loader(RememberingShards()), 2)
        with pytest.raises(DataError, match=r"the training data has lost its shard\(num_shards, index\)"):
            stream_loader(Remembering()).load_state_dict(state)
        with pytest.raises(
            LoadingError, match=r"state of a stream, and Shards has no load_state_dict\(state\) to load"
        ):
            take_steps(loaded(stream_loader(Shards()), state), 1)
        accepting = loaded(stream_loader(Remembering(), accept_other_data=True), state)
        assert take_steps(accepting, 1) == take_steps(stream_loader(Remembering()), 3)[2:]


def test_what_a_person_should_know():
    assert stream_loader(Shards(), range(2), num_workers=2).notes == []
    assert stream_loader(Numbers(), num_workers=1).notes == []
    (note,) = stream_loader(Shards(), range(2), num_workers=3).notes
    assert note == "num_workers=3: each rank uses only 2 of them, one for each slot"
    cost, workers = stream_loader(Numbers(), range(2), num_workers=3).notes
    assert "each rank reads all of it" in cost
    assert "each rank uses only 1 of them, since one process reads a stream without shard()" in workers


def test_more_workers_than_can_be_of_use_are_not_started():
    loader = stream_loader(Shards(), range(2), num_workers=7)
    batch = next(iter(loader))
    loaders = {int(pid) for _, _, pids in batch for pid in pids}
    loader.close()
    assert len(loaders) == 2
    assert os.getpid() not in loaders
