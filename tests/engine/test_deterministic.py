"""DeterministicEngine: a resumed run gets the batches of the uninterrupted run, from any kind of data."""

import inspect
import io
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from disttrain.backend import Backend
from disttrain.data.loader import SlotLoader
from disttrain.data.sampler import SlotBatchSampler
from disttrain.engine import DeterministicEngine, Events, ReproducibleBatchSampler, keep_random_state, update_dataloader
from disttrain.seeding import manual_seed

SAMPLES = torch.arange(40)  # ten batches of four


def draw() -> list[float]:
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def as_list(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else [as_list(part) for part in batch]


def engine_over(record: list[Any], *, draws: bool = True) -> DeterministicEngine:
    """Return an engine that records each iteration, its batch, and the numbers that the step draws, as dropout does."""

    def step(engine: DeterministicEngine, batch: Any) -> None:
        record.append((engine.state.iteration, as_list(batch), draw() if draws else None))

    return DeterministicEngine(step)


def through_a_file(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def whole_run(
    make: Callable[[], Any], *, draws: bool = True, max_epochs: int = 3, epoch_length: int | None = None
) -> tuple[list[Any], dict[int, Any]]:
    """Run without a stop; return the record, and the state dict after each iteration, read from a file."""
    record: list[Any] = []
    engine = engine_over(record, draws=draws)
    saved: dict[int, Any] = {}

    @engine.on(Events.ITERATION_COMPLETED)
    def save(engine: DeterministicEngine) -> None:  # a closure over the engine would keep the loaders' workers alive
        saved[engine.state.iteration] = through_a_file(engine.state_dict())

    manual_seed(56)
    engine.run(make(), max_epochs=max_epochs, epoch_length=epoch_length)
    return record, saved


def check_resume(make: Callable[[], Any], *, at: list[int] | None = None, draws: bool = True, **options: Any) -> None:
    """Resume from every iteration, or from those of `at`, with the generators in other states; compare records."""
    record, saved = whole_run(make, draws=draws, **options)
    last = len(record)
    for iteration in at or range(1, last):
        resumed: list[Any] = []
        engine = engine_over(resumed, draws=draws)
        again = {}

        @engine.on(Events.ITERATION_COMPLETED)
        def save_again(engine: DeterministicEngine, again: dict[int, Any] = again) -> None:
            again[engine.state.iteration] = engine.state_dict()

        manual_seed(1000 + iteration)
        draw()
        engine.load_state_dict(saved[iteration])
        engine.run(make())
        assert resumed == record[iteration:], f"resumed at {iteration}"
        for later, state_dict in again.items():  # the resumed run can be resumed again
            assert (state_dict["seed"], state_dict["pass_started"]) == (
                saved[later]["seed"],
                saved[later]["pass_started"],
            )


class Augmented(Dataset[torch.Tensor]):
    """Samples with random numbers from all three generators."""

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(SAMPLES[index]), *draw()])


class Stream(IterableDataset[torch.Tensor]):
    """`count` random numbers a pass (None: without end), divided between the workers; it has no length."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index = first
        while self.count is None or index < self.count:
            yield torch.tensor([index, *draw()])
            index += step


class Drawing(BatchSampler):
    """A batch sampler of the user's own that draws each batch from the global generators when it is fetched."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(SAMPLES), 4, False)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(10):
            yield torch.randint(40, (2,)).tolist() + [random.randrange(40)]


def generator() -> Iterator[torch.Tensor]:
    while True:
        yield torch.randint(0, 100, size=(1,))


MAP_STYLE: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(Augmented(), batch_size=4),
    "last batch smaller": lambda: DataLoader(Augmented(), batch_size=6, shuffle=True),
    "last batch dropped": lambda: DataLoader(Augmented(), batch_size=6, shuffle=True, drop_last=True),
    "a generator of its own": lambda: DataLoader(
        Augmented(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "a sampler with a generator": lambda: DataLoader(
        Augmented(), batch_size=4, sampler=RandomSampler(SAMPLES, generator=torch.Generator().manual_seed(5))
    ),
    "with replacement": lambda: DataLoader(
        Augmented(), batch_size=4, sampler=RandomSampler(SAMPLES, replacement=True, num_samples=36)
    ),
    "weighted": lambda: DataLoader(Augmented(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(40), 40)),
    "a subset": lambda: DataLoader(Augmented(), batch_size=4, sampler=SubsetRandomSampler(range(30))),
    "a drawing batch sampler": lambda: DataLoader(Augmented(), batch_sampler=Drawing()),
    "wrapped by the user": lambda: DataLoader(
        Augmented(), batch_sampler=ReproducibleBatchSampler(BatchSampler(RandomSampler(SAMPLES), 4, False))
    ),
    "batches as samples": lambda: DataLoader(
        SAMPLES, batch_size=None, sampler=BatchSampler(RandomSampler(SAMPLES), 4, drop_last=True)
    ),
    "our order": lambda: DataLoader(Augmented(), batch_sampler=SlotBatchSampler(40, 4, seed=3)),
    "our order, two slots": lambda: DataLoader(Augmented(), batch_sampler=SlotBatchSampler(40, 8, 2, seed=3)),
    "our order, wrapped": lambda: DataLoader(
        Augmented(), batch_sampler=ReproducibleBatchSampler(SlotBatchSampler(40, 4, seed=3))
    ),
}


@pytest.mark.parametrize("name", MAP_STYLE)
def test_a_loader_in_this_process_resumes_with_its_augmentations(name: str) -> None:
    check_resume(MAP_STYLE[name])


@pytest.mark.parametrize("epoch_length", [4, 13])
@pytest.mark.parametrize("name", ["shuffled", "weighted", "our order"])
def test_epochs_that_are_not_the_passes_resume_too(name: str, epoch_length: int) -> None:
    check_resume(
        MAP_STYLE[name],
        at=[3, 4, 10, 11, 12, 20, 25, 26, 34],
        epoch_length=epoch_length,
        max_epochs=40 // epoch_length + 1,
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_with_workers_resumes(persistent: bool, own_generator: bool) -> None:
    def make() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(SAMPLES, 4, shuffle=True, num_workers=2, persistent_workers=persistent, generator=generator)

    check_resume(make, at=[3, 10, 13], max_epochs=2)


def test_the_number_of_workers_does_not_change_the_order() -> None:
    def batches(num_workers: int) -> list[Any]:
        record, _ = whole_run(
            lambda: DataLoader(SAMPLES, 4, shuffle=True, num_workers=num_workers), draws=False, max_epochs=2
        )
        return record

    assert batches(0) == batches(2)


@pytest.mark.parametrize("epoch_length", [4, 7])
def test_a_generator_is_fetched_and_dropped(epoch_length: int) -> None:
    check_resume(generator, epoch_length=epoch_length)


def test_a_list_resumes() -> None:
    check_resume(lambda: [torch.tensor(number) for number in range(7)])
    check_resume(lambda: [torch.tensor(number) for number in range(7)], epoch_length=5)


@pytest.mark.parametrize("epoch_length", [None, 4, 7, 10])
def test_an_unsized_iterable_dataset_resumes_from_the_beginning_of_its_pass(epoch_length: int | None) -> None:
    check_resume(lambda: DataLoader(Stream(20), batch_size=3), epoch_length=epoch_length)


def test_an_unsized_stream_without_end_resumes() -> None:
    check_resume(lambda: DataLoader(Stream(None), batch_size=3), epoch_length=4)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_iterable_dataset_with_workers_resumes_with_its_augmentations(persistent: bool) -> None:
    # Persistent workers keep their generators from pass to pass, so only a resume in the first pass is the same.
    count = 1 if persistent else 3
    check_resume(
        lambda: DataLoader(Stream(20), batch_size=3, num_workers=2, persistent_workers=persistent),
        at=[2, 5][:count],
        max_epochs=1 if persistent else 2,
    )


def test_an_unsized_pass_is_fetched_no_further_back_than_it_began() -> None:
    fetched = []

    class Counted(Stream):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for batch in super().__iter__():
                fetched.append(1)
                yield batch

    record, saved = whole_run(lambda: DataLoader(Counted(5), batch_size=None))
    assert len(record) == 15
    fetched.clear()
    engine = engine_over([])
    engine.load_state_dict(saved[12])
    engine.run(DataLoader(Counted(5), batch_size=None))
    assert len(fetched) == 5  # two dropped, three used


@pytest.mark.parametrize(
    "make",
    [lambda: DataLoader(SAMPLES, 4, shuffle=True), generator, lambda: DataLoader(Stream(20), batch_size=3)],
)
def test_a_state_dict_of_the_counters_and_the_seed_alone_gives_the_same_batches(make: Callable[[], Any]) -> None:
    record, saved = whole_run(make, draws=False, epoch_length=7)
    for iteration in (3, 8, 15):
        resumed: list[Any] = []
        engine = engine_over(resumed, draws=False)
        bare = {key: value for key, value in saved[iteration].items() if key != "pass_started"}
        engine.load_state_dict({**bare, "rng_states": None})
        engine.run(make())
        assert resumed == record[iteration:]


def test_a_pass_that_began_after_a_terminated_epoch_resumes() -> None:
    record: list[Any] = []
    engine = engine_over(record)
    saved: dict[int, Any] = {}

    @engine.on(Events.ITERATION_COMPLETED)
    def save_and_stop(engine: DeterministicEngine) -> None:
        saved[engine.state.iteration] = through_a_file(engine.state_dict())
        if engine.state.iteration == 3:
            engine.terminate_epoch()

    engine.run(MAP_STYLE["shuffled"](), max_iters=30)
    for iteration in (5, 13, 14, 25):
        resumed: list[Any] = []
        engine = engine_over(resumed)
        engine.load_state_dict(saved[iteration])
        engine.run(MAP_STYLE["shuffled"]())
        assert resumed == record[iteration:]


class TestSeekable:
    def make(self, num_workers: int = 0) -> SlotLoader:
        return SlotLoader(Augmented(), SlotBatchSampler(40, 8, 2, seed=3), num_workers=num_workers)

    def test_our_loader_resumes_with_its_augmentations(self) -> None:
        check_resume(self.make)
        check_resume(self.make, epoch_length=3)

    def test_our_loader_with_workers_resumes_too(self) -> None:
        check_resume(lambda: self.make(2), at=[3, 5, 8])

    def test_seekable_data_is_sought_and_no_batch_is_dropped(self) -> None:
        class Sought:
            """Ten batches an epoch, each its position."""

            def __init__(self) -> None:
                self.sought: list[tuple[int, int]] = []
                self.fetched: list[tuple[int, int]] = []

            def __len__(self) -> int:
                return 10

            def seek(self, epoch: int, step: int) -> None:
                self.sought.append((epoch, step))

            def __iter__(self) -> Iterator[tuple[int, int]]:
                epoch, first = self.sought[-1]
                for step in range(first, 10):
                    self.fetched.append((epoch, step))
                    yield epoch, step

        data = Sought()
        engine = DeterministicEngine(lambda engine, batch: None)
        engine.load_state_dict({"iteration": 23, "epoch_length": 10, "max_epochs": 4, "rng_states": None})
        engine.run(data)
        assert data.sought == [(2, 3), (3, 0)]
        assert data.fetched == [(2, step) for step in range(3, 10)] + [(3, step) for step in range(10)]

    def test_its_batch_is_a_function_of_the_iteration_after_a_terminated_epoch_too(self) -> None:
        record: list[Any] = []
        engine = engine_over(record, draws=False)

        @engine.on(Events.ITERATION_COMPLETED(once=3))
        def stop(engine: DeterministicEngine) -> None:
            engine.terminate_epoch()

        engine.run(self.make(), max_epochs=2)
        loader = self.make()
        straight = [as_list(batch) for _ in range(2) for batch in loader]
        assert [batch for _, batch, _ in record] == straight[:8]

    def test_a_file_is_not_seekable_data(self) -> None:
        lines: list[str] = []
        engine = DeterministicEngine(lambda engine, line: lines.append(line))
        engine.load_state_dict({"iteration": 1, "epoch_length": 3, "max_epochs": 1, "rng_states": None})
        engine.run(io.StringIO("a\nb\nc\n"))
        assert lines == ["b\n", "c\n"]


class TestSeed:
    def seeds(self, engine: DeterministicEngine, data: Any, **options: Any) -> list[int]:
        """Run, and return the last seed of torch's generator at each iteration, minus the run's seed."""
        seeds: list[int] = []
        engine.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: seeds.append(torch.initial_seed() - engine.state.seed)
        )
        engine.run(data, **options)
        return seeds

    def engine(self) -> DeterministicEngine:
        return DeterministicEngine(lambda engine, batch: None)

    def test_started_draws_the_seed_from_torchs_generator(self) -> None:
        engine = self.engine()
        seen = []
        engine.add_event_handler(Events.STARTED, lambda engine: seen.append(engine.state.seed))
        manual_seed(56)
        expected = torch.randint(0, 10**9, (1,)).item()
        manual_seed(56)
        engine.run([1])
        assert seen == [expected]
        engine.run([1])
        assert seen[1] != expected  # a new run, a new draw
        manual_seed(56)
        engine.run([1])
        assert seen[2] == expected

    def test_reseeds_with_seed_plus_passes_at_set_up_and_when_the_data_stops(self) -> None:
        assert self.seeds(self.engine(), [1, 2, 3], max_epochs=3) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert self.seeds(self.engine(), [1, 2, 3], max_epochs=2, epoch_length=4) == [0, 0, 0, 1, 1, 1, 2, 2]
        assert self.seeds(self.engine(), [1, 2, 3], max_epochs=2, epoch_length=2) == [0, 0, 0, 1]

    def test_reseeds_at_set_up_of_a_resumed_run(self) -> None:
        engine = self.engine()
        engine.load_state_dict({"iteration": 4, "epoch_length": 3, "max_epochs": 3, "rng_states": None})
        assert self.seeds(engine, [1, 2, 3]) == [1, 1, 2, 2, 2]

    def test_reseeds_when_an_epoch_is_terminated(self) -> None:
        engine = self.engine()

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def stop(engine: DeterministicEngine) -> None:
            manual_seed(12345)
            engine.terminate_epoch()

        assert self.seeds(engine, [1, 2, 3], max_epochs=3)[:5] == [0, 0, 0, 1, 1]

    def test_without_a_length_passes_are_counted_in_epochs(self) -> None:
        assert self.seeds(self.engine(), DataLoader(Stream(2)), max_epochs=3) == [0, 0, 1, 1, 2, 2]

    def test_the_seed_is_in_the_state_dict_and_a_resume_needs_no_manual_seed(self) -> None:
        record, saved = whole_run(MAP_STYLE["shuffled"])
        engine = engine_over([])
        engine.load_state_dict(saved[20])
        assert engine.state.seed == saved[20]["seed"]
        engine.run(MAP_STYLE["shuffled"]())
        assert engine.state.seed == saved[20]["seed"]
        assert whole_run(MAP_STYLE["shuffled"])[0] == record

    def test_a_seed_loaded_at_the_very_beginning_is_kept_for_one_run(self) -> None:
        state_dict = {"iteration": 0, "epoch_length": 2, "max_epochs": 1, "rng_states": None, "seed": 77}
        engine = self.engine()
        engine.load_state_dict(state_dict)
        engine.run([1, 2])
        assert engine.state.seed == 77
        engine.run([1, 2])
        assert engine.state.seed != 77

    def test_without_a_seed_in_the_dict_started_draws_it(self) -> None:
        engine = self.engine()
        manual_seed(56)
        engine.run([1, 2], max_epochs=2)
        first = engine.state.seed
        engine.load_state_dict({"epoch": 1, "epoch_length": 2, "max_epochs": 2, "rng_states": None})
        assert engine.state.seed is None
        manual_seed(56)
        engine.run([1, 2])
        assert engine.state.seed == first

    def test_a_run_that_goes_on_after_terminate_keeps_its_seed(self) -> None:
        engine = self.engine()
        seeds = []
        engine.add_event_handler(Events.STARTED, lambda engine: seeds.append(engine.state.seed))
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
        engine.run([1, 2, 3], max_epochs=3)
        engine.run([1, 2, 3])
        assert len(seeds) == 2
        assert seeds[0] == seeds[1]


def own_seed_of_each_rank(backend: Backend) -> tuple[int, int]:
    """Return a rank's draw and the engine's seed; every rank's generator has another state."""
    manual_seed(100 + backend.rank)
    mine = int(torch.randint(0, 10**9, (1,)).item())
    manual_seed(100 + backend.rank)
    engine = DeterministicEngine(lambda engine, batch: None, backend=backend)
    engine.run([1])
    return mine, engine.state.seed


def test_every_rank_takes_rank_0s_seed(ranks: Ranks) -> None:
    (drawn, first), (other, second) = ranks(2, own_seed_of_each_rank)
    assert first == second == drawn != other


def append_state(engine: DeterministicEngine, states: list[torch.Tensor]) -> None:
    states.append(torch.get_rng_state())


class TestStateDict:
    def test_user_key_is_rng_states_and_its_own_initial_one_loads(self) -> None:
        engine = DeterministicEngine(lambda engine, batch: None)
        assert engine.state_dict_user_keys == ["rng_states"]
        initial = engine.state_dict()
        assert list(initial) == ["epoch_length", "iteration", "max_epochs", "rng_states", "seed", "pass_started"]
        engine.load_state_dict(through_a_file(initial))
        assert engine.run([1, 2]).iteration == 2

    def test_rng_states_are_required_and_may_be_none(self) -> None:
        engine = DeterministicEngine(lambda engine, batch: None)
        state_dict = {"iteration": 1, "epoch_length": 2, "max_epochs": 1}
        with pytest.raises(ValueError, match="rng_states"):
            engine.load_state_dict(state_dict)
        engine.load_state_dict({**state_dict, "rng_states": None})
        assert engine.run([1, 2]).iteration == 2

    def test_rng_states_are_put_back_inside_a_pass_alone(self) -> None:
        _, saved = whole_run(lambda: list(torch.arange(4)), max_epochs=2)
        for iteration, restored in ((3, True), (4, False)):
            engine = engine_over([])
            first: list[torch.Tensor] = []
            engine.add_event_handler(Events.ITERATION_STARTED, append_state, first)
            engine.load_state_dict(saved[iteration])
            engine.run(list(torch.arange(4)))
            assert torch.equal(first[0], saved[iteration]["rng_states"]["torch"]) is restored
            assert engine.state.rng_states is None

    def test_rng_states_are_put_back_in_the_first_run_alone(self) -> None:
        """A second run of the same engine does not use the state that was loaded for the first."""
        record, saved = whole_run(lambda: list(torch.arange(4)), max_epochs=1)
        resumed: list[Any] = []
        engine = engine_over(resumed)
        engine.load_state_dict(saved[2])
        engine.run(list(torch.arange(4)))
        manual_seed(56)
        engine.run(list(torch.arange(4)))
        assert resumed == record[2:] + record


class TestWrapping:
    def test_a_map_style_loaders_batch_sampler_is_wrapped_once(self) -> None:
        engine = DeterministicEngine(lambda engine, batch: None)
        loader = MAP_STYLE["shuffled"]()
        for _ in range(2):
            engine.run(loader, max_epochs=2)
            wrapped = engine.state.dataloader.batch_sampler
            assert isinstance(wrapped, ReproducibleBatchSampler)
            assert wrapped.batch_sampler is loader.batch_sampler
        engine.run(engine.state.dataloader, max_epochs=2)
        assert engine.state.dataloader.batch_sampler is wrapped
        assert isinstance(loader.batch_sampler, BatchSampler)
        assert not isinstance(loader.batch_sampler, ReproducibleBatchSampler)

    def test_after_a_resume_the_users_batch_sampler_is_in_its_place_again(self) -> None:
        _, saved = whole_run(MAP_STYLE["shuffled"])
        engine = engine_over([])
        engine.load_state_dict(saved[13])
        loader = MAP_STYLE["shuffled"]()
        engine.run(loader)
        wrapped = engine.state.dataloader.batch_sampler
        assert wrapped.batch_sampler is loader.batch_sampler
        assert wrapped.start_iteration is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: DataLoader(Stream(8), batch_size=4),
            lambda: DataLoader(SAMPLES, batch_size=None),
            lambda: [SAMPLES],
            lambda: DataLoader(SAMPLES, batch_sampler=[[0, 1], [2, 3]]),  # type: ignore[arg-type]
        ],
    )
    def test_other_data_stays_as_it_is(self, make: Callable[[], Any]) -> None:
        engine, data = DeterministicEngine(lambda engine, batch: None), make()
        engine.run(data, max_epochs=2)
        assert engine.state.dataloader is data

    def test_indices_are_passed_over_and_no_sample_is_loaded(self) -> None:
        loaded = []

        class Counted(Augmented):
            def __getitem__(self, index: int) -> torch.Tensor:
                loaded.append(index)
                return super().__getitem__(index)

        _, saved = whole_run(MAP_STYLE["shuffled"])
        engine = engine_over([])
        engine.load_state_dict(saved[28])
        engine.run(DataLoader(Counted(), batch_size=4, shuffle=True))
        assert len(loaded) == 2 * 4

    def test_programs_can_import_the_names_from_the_room_and_the_module(self) -> None:
        from disttrain import engine as room
        from disttrain import seeding
        from disttrain.engine import deterministic as module

        for name in ("DeterministicEngine", "ReproducibleBatchSampler", "keep_random_state", "update_dataloader"):
            assert getattr(module, name) is getattr(room, name)
        assert keep_random_state is seeding.keep_random_state
        batch_sampler = BatchSampler(SequentialSampler(SAMPLES), 8, False)
        assert update_dataloader(DataLoader(SAMPLES), batch_sampler).batch_sampler is batch_sampler


class TestData:
    def test_without_data_there_is_nothing_to_reproduce(self) -> None:
        engine = DeterministicEngine(lambda engine, batch: None)
        with pytest.raises(ValueError, match="expected data, got None"):
            engine.run(epoch_length=3)
        assert engine.state.iteration == 0

    def test_data_set_before_the_run_is_data(self) -> None:
        record: list[Any] = []
        engine = engine_over(record, draws=False)
        engine.set_data([torch.tensor(1)])
        engine.run()
        assert [batch for _, batch, _ in record] == [1]

    def test_data_swapped_in_a_run_is_wrapped_and_seeded(self) -> None:
        engine = engine_over(record := [])
        other = DataLoader(Augmented(), batch_size=8, shuffle=True)

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def swap(engine: DeterministicEngine) -> None:
            manual_seed(0)
            engine.set_data(other)

        manual_seed(56)
        engine.run(MAP_STYLE["shuffled"](), max_epochs=1)
        assert isinstance(engine.state.dataloader.batch_sampler, ReproducibleBatchSampler)
        assert [len(batch) for _, batch, _ in record] == [4] * 4 + [8] * 5 + [8]
        seen = [index for _, batch, _ in record[4:9] for index, *_ in batch]
        assert sorted(seen) == sorted(float(sample) for sample in SAMPLES)

    def test_dropping_batches_stops_when_the_data_has_ended_for_good(self) -> None:
        engine = engine_over([])
        engine.load_state_dict({"iteration": 5, "epoch_length": 10, "max_epochs": 1, "rng_states": None})
        with pytest.warns(UserWarning, match="a fresh iterator gave none"):
            engine.run(iter([torch.tensor(1)] * 3), epoch_length=10)
        assert engine.state.iteration == 5


class TestOthersRandomness:
    def test_an_engine_in_a_handler_leaves_no_trace(self) -> None:
        def run(validate: bool) -> tuple[list[Any], list[Any]]:
            record: list[Any] = []
            inner_record: list[Any] = []
            trainer, evaluator = engine_over(record), engine_over(inner_record)
            if validate:
                trainer.add_event_handler(
                    Events.ITERATION_COMPLETED(every=3), lambda: evaluator.run(MAP_STYLE["shuffled"]())
                )
            manual_seed(56)
            trainer.run(MAP_STYLE["shuffled"](), max_epochs=2)
            return record, inner_record

        with_it, inner = run(True)
        assert with_it == run(False)[0]
        assert len(inner) == 6 * 10
        assert inner == run(True)[1]
        assert inner[:10] != inner[10:20]

    def test_an_engine_on_its_own_draws_a_new_seed_each_time(self) -> None:
        record: list[Any] = []
        engine = engine_over(record)
        manual_seed(56)
        for _ in range(2):
            engine.run(MAP_STYLE["shuffled"]())
        assert record[:10] != record[10:]

    @pytest.mark.parametrize("name", ["shuffled", "a drawing batch sampler"])
    def test_an_interrupted_engine_goes_on_with_its_own_generators(self, name: str) -> None:
        expected, _ = whole_run(MAP_STYLE[name])
        record: list[Any] = []
        engine = engine_over(record)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=7), lambda engine: engine.interrupt())
        manual_seed(56)
        engine.run(MAP_STYLE[name](), max_epochs=3)
        for _ in range(4):
            manual_seed(random.randrange(100))
            engine.run()
        assert record == expected


def nothing(engine: DeterministicEngine, batch: Any) -> None:
    return None


@pytest.mark.usefixtures("no_collector")
def test_an_engine_is_freed_at_once_and_can_be_pickled() -> None:
    engine = DeterministicEngine(nothing)
    engine.run(MAP_STYLE["shuffled"]())
    copy = pickle.loads(pickle.dumps(DeterministicEngine(nothing)))
    assert copy.run([1, 2]).iteration == 2
    reference = weakref.ref(engine)
    del engine
    assert reference() is None


def test_signature() -> None:
    parameters = inspect.signature(DeterministicEngine).parameters
    assert [(p.name, p.kind) for p in parameters.values()] == [
        ("process_function", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("backend", inspect.Parameter.KEYWORD_ONLY),
    ]
