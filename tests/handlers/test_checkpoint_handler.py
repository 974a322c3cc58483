"""The Checkpoint handler, as programs for the reference API use it, and the points in which it is better."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stateful_objects import Number
from torch import nn

from disttrain.checkpoint import CheckpointInfo, DirectorySaver, DiskSaver, committed, load, save, store_at
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError
from disttrain.handlers.checkpoint import Checkpoint


class Memory:
    """A save handler that keeps everything in memory, and fails if `broken` is set."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.happened: list[str] = []
        self.broken = False

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        if self.broken:
            raise CheckpointError("the disk is full")
        self.happened.append(f"save {filename}")
        self.files[filename] = checkpoint
        self.calls.append((filename, metadata))

    def remove(self, filename: str) -> None:
        self.happened.append(f"remove {filename}")
        del self.files[filename]


def run(handler: Checkpoint, epochs: int = 3, scores: list[Any] | None = None) -> Engine:
    """Run an engine of ten iterations an epoch with the handler at the end of each epoch."""
    trainer = Engine(lambda engine, batch: None)
    if scores is not None:
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(accuracy=scores[e.state.epoch - 1])
        )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(10), max_epochs=epochs)
    return trainer


def step_of_trainer(engine: Engine, event: Any) -> int:
    return engine.state.iteration


# ---- names


@pytest.mark.parametrize(
    ("arguments", "objects", "expected"),
    [
        ({}, 2, "checkpoint_30.pt"),
        ({}, 1, "model_30.pt"),
        ({"filename_prefix": "best"}, 2, "best_checkpoint_30.pt"),
        ({"global_step_transform": lambda e, event: e.state.epoch}, 1, "model_3.pt"),
        ({"score_function": lambda e: 0.91549}, 1, "model_0.9155.pt"),
        ({"score_function": lambda e: 7}, 1, "model_7.pt"),
        ({"score_name": "accuracy"}, 1, "model_accuracy=0.5000.pt"),
        (
            {"score_name": "accuracy", "global_step_transform": step_of_trainer, "filename_prefix": "best"},
            2,
            "best_checkpoint_30_accuracy=0.5000.pt",
        ),
        ({"score_function": lambda e: -0.25, "score_name": "loss"}, 1, "model_loss=-0.2500.pt"),
        ({"filename_pattern": "{name}-{global_step:05d}.{ext}"}, 1, "model-00030.pt"),
        ({"include_self": True}, 1, "checkpoint_30.pt"),
    ],
)
def test_file_names(arguments: dict[str, Any], objects: int, expected: str) -> None:
    memory = Memory()
    to_save = {"model": Number(), "optimizer": Number()}
    handler = Checkpoint({name: to_save[name] for name in list(to_save)[:objects]}, memory, **arguments)
    run(handler, scores=[0.3, 0.4, 0.5])
    assert memory.calls[-1][0] == expected
    assert handler.last_checkpoint == expected


def test_the_example_of_the_reference_documentation(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = Engine(lambda engine, batch: None)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    handler = Checkpoint(to_save, DiskSaver(tmp_path / "training", create_dir=True))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), handler)
    trainer.run(range(10), max_epochs=2)
    assert os.listdir(tmp_path / "training") == ["checkpoint_20.pt"]
    assert handler.last_checkpoint == tmp_path / "training" / "checkpoint_20.pt"

    checkpoint = torch.load(tmp_path / "training" / "checkpoint_20.pt", weights_only=True)
    resumed = Engine(lambda engine, batch: None)
    Checkpoint.load_objects(to_load={"trainer": resumed, "model": other}, checkpoint=checkpoint)
    assert torch.equal(other.weight, model.weight)
    assert resumed.state.iteration == 20
    assert resumed.run(range(10), max_epochs=3).iteration == 30


def test_a_path_is_a_directory_of_files(tmp_path: Path) -> None:
    handler = Checkpoint({"model": Number(5)}, str(tmp_path / "new"))
    run(handler)
    assert os.listdir(tmp_path / "new") == ["model_30.pt"]
    loaded = Number()
    assert isinstance(handler.last_checkpoint, Path)
    Checkpoint.load_objects({"model": loaded}, str(handler.last_checkpoint))
    assert loaded.value == 5


def test_metadata_describes_the_checkpoint() -> None:
    memory = Memory()
    run(Checkpoint({"model": Number()}, memory, score_name="accuracy", filename_prefix="best"), 1, [0.5])
    expected = {"basename": "best_model", "score_name": "accuracy", "priority": 0.5, "global_step": 10}
    assert memory.calls == [("best_model_accuracy=0.5000.pt", expected)]


def test_a_save_handler_may_take_two_arguments_and_have_no_remove() -> None:
    names: list[str] = []

    def keep_name(checkpoint: Any, filename: str) -> None:
        names.append(filename)

    run(Checkpoint({"model": Number()}, keep_name))
    assert names == ["model_10.pt", "model_20.pt", "model_30.pt"]


# ---- what is kept


@pytest.mark.parametrize(("n_saved", "kept"), [(1, [50]), (2, [40, 50]), (None, [10, 20, 30, 40, 50])])
def test_the_newest_are_kept(n_saved: int | None, kept: list[int]) -> None:
    memory = Memory()
    run(Checkpoint({"model": Number()}, memory, n_saved=n_saved), epochs=5)
    assert list(memory.files) == [f"model_{step}.pt" for step in kept]


def test_a_step_that_is_saved_again_removes_no_other_checkpoint(tmp_path: Path) -> None:
    # An object store adds a part of its own to each name, and the second process saves step 8 again.
    store = f"local://{tmp_path}/c"
    for steps in ((4, 8), (8,)):
        handler = Checkpoint({"model": Number()}, DirectorySaver(store), n_saved=2)
        for step in steps:
            engine = Engine(lambda engine, batch: None)
            engine.state.iteration = step
            handler(engine)
    assert sorted(name.partition(".")[0] for name in store_at(store).committed()) == ["step-00000004", "step-00000008"]


def test_kept_checkpoints_stay_beside_the_newest() -> None:
    memory, kept = Memory(), {"model_10.pt"}
    handler = Checkpoint({"model": Number()}, memory, n_saved=2, keeps=lambda filename: filename in kept)
    run(handler, epochs=4)
    assert list(memory.files) == ["model_10.pt", "model_30.pt", "model_40.pt"]
    kept.clear()
    kept.add("model_40.pt")
    run(handler, epochs=2)
    assert set(memory.files) == {"model_40.pt", "model_10.pt", "model_20.pt"}  # the second run counts from 1 again


def test_an_old_one_is_removed_only_after_the_new_one_is_safe() -> None:
    memory = Memory()
    handler = Checkpoint({"model": Number()}, memory)
    run(handler, epochs=2)
    assert memory.happened == ["save model_10.pt", "save model_20.pt", "remove model_10.pt"]
    memory.broken = True
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(handler, epochs=1)
    assert list(memory.files) == ["model_20.pt"]
    assert handler.last_checkpoint == "model_20.pt"


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "n_saved", "equal", "kept"),
    [
        ([0.1, 0.3, 0.2], 1, False, ["0.3000"]),
        ([0.3, 0.1, 0.2], 2, False, ["0.3000", "0.2000"]),
        ([0.3, 0.1, 0.2], None, False, ["0.3000", "0.1000", "0.2000"]),
        ([NAN, 0.1, NAN], 1, False, ["0.1000"]),
        ([0.1, NAN, 0.2], 2, False, ["0.1000", "0.2000"]),
        ([torch.tensor(0.1), np.float64(0.2), 0.15], 1, False, ["0.2000"]),
    ],
)
def test_the_best_are_kept(scores: list[Any], n_saved: int | None, equal: bool, kept: list[str]) -> None:
    memory = Memory()
    handler = Checkpoint({"model": Number()}, memory, score_name="accuracy", n_saved=n_saved)
    run(handler, 3, scores)
    assert list(memory.files) == [f"model_accuracy={score}.pt" for score in kept]
    assert handler.last_checkpoint == f"model_accuracy={max(kept)}.pt"


@pytest.mark.parametrize(("greater_or_equal", "step"), [(False, 10), (True, 30)])
def test_an_equal_score_replaces_the_older_one_if_asked(greater_or_equal: bool, step: int) -> None:
    memory = Memory()
    handler = Checkpoint(
        {"model": Number()},
        memory,
        score_name="accuracy",
        greater_or_equal=greater_or_equal,
        global_step_transform=step_of_trainer,
    )
    run(handler, 3, [0.5, 0.4, 0.5])
    assert list(memory.files) == [f"model_{step}_accuracy=0.5000.pt"]


def test_a_lower_score_is_better_with_a_negative_sign() -> None:
    memory = Memory()
    handler = Checkpoint({"m": Number()}, memory, score_function=Checkpoint.get_default_score_fn("accuracy", -1.0))
    run(handler, 3, [0.5, 0.2, 0.3])
    assert list(memory.files) == ["m_-0.2000.pt"]


def test_a_second_run_that_counts_from_one_again_is_saved_too() -> None:
    memory = Memory()
    handler = Checkpoint({"model": Number()}, memory, n_saved=2)
    run(handler, epochs=5)
    run(handler, epochs=1)
    assert list(memory.files) == ["model_50.pt", "model_10.pt"]


def test_a_name_saved_again_is_one_checkpoint() -> None:
    memory, number = Memory(), Number(1)
    handler = Checkpoint({"model": number}, memory, n_saved=2, filename_pattern="last.{ext}")
    run(handler, epochs=2)
    number.value = 2
    run(handler, epochs=1)
    assert memory.files == {"last.pt": {"value": 2}}
    assert "remove last.pt" not in memory.happened


def test_reset_forgets_and_removes_nothing() -> None:
    memory = Memory()
    handler = Checkpoint({"model": Number()}, memory)
    run(handler, epochs=2)
    handler.reset()
    assert handler.last_checkpoint is None
    run(handler, epochs=1)
    assert list(memory.files) == ["model_20.pt", "model_10.pt"]


def test_its_own_state_can_be_saved_with_the_rest(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    handler = Checkpoint({"model": Number(7)}, saver, n_saved=2, include_self=True)
    run(handler, epochs=3)
    checkpoint = torch.load(tmp_path / "checkpoint_30.pt", weights_only=True)
    # The list holds the checkpoints that are there once this one is safe, itself included.
    assert checkpoint["checkpointer"] == {"_saved": [(20, "checkpoint_20.pt"), (30, "checkpoint_30.pt")]}
    again = Checkpoint({"model": Number()}, saver, n_saved=2, include_self=True)
    Checkpoint.load_objects({"model": again.to_save["model"], "checkpointer": again}, checkpoint)
    assert again.to_save["model"].value == 7
    assert again.state_dict() == handler.state_dict()
    run(again, epochs=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_10.pt", "checkpoint_30.pt"]


# ---- checkpoint directories


def directory_handler(root: Path, model: Any, n_saved: int | None = 3) -> Checkpoint:
    saver = DirectorySaver(root, describe=lambda: CheckpointInfo(seed=1))
    return Checkpoint({"model": model}, saver, n_saved=n_saved)


def test_directories_are_named_by_step_and_verified(tmp_path: Path) -> None:
    handler = directory_handler(tmp_path, nn.Linear(2, 1))
    run(handler, epochs=5)
    assert committed(tmp_path) == ["step-00000050", "step-00000040", "step-00000030"]
    assert handler.last_checkpoint == tmp_path / "step-00000050"
    assert load(tmp_path / "step-00000050").manifest.seed == 1


def test_directories_of_an_earlier_process_are_rotated_out(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, {}, keep=None)
    run(directory_handler(tmp_path, Number()), epochs=1)
    assert committed(tmp_path) == ["step-00000010", "step-00000005", "step-00000004"]


def test_at_least_two_directories_stay(tmp_path: Path) -> None:
    run(directory_handler(tmp_path, Number(), n_saved=1), epochs=5)
    assert committed(tmp_path) == ["step-00000050", "step-00000040"]


def test_directories_can_be_kept_by_score(tmp_path: Path) -> None:
    handler = Checkpoint({"model": Number()}, DirectorySaver(tmp_path), score_name="accuracy", n_saved=2)
    run(handler, 4, [0.3, 0.9, 0.5, 0.1])
    assert committed(tmp_path) == ["step-00000030", "step-00000020"]
    assert handler.last_checkpoint == tmp_path / "step-00000020"


# ---- loading


def test_objects_are_loaded_from_a_file_a_checkpoint_or_a_directory_of_them(tmp_path: Path) -> None:
    run(Checkpoint({"a": Number(1), "b": Number(2)}, DiskSaver(tmp_path / "files")))
    run(Checkpoint({"a": Number(3), "b": Number(4)}, DirectorySaver(tmp_path / "c")))
    for path, expected in (
        (tmp_path / "files" / "checkpoint_30.pt", (1, 2)),
        (tmp_path / "c" / "step-00000020", (3, 4)),
        (tmp_path / "c", (3, 4)),
    ):
        a, b = Number(), Number()
        Checkpoint.load_objects({"a": a, "b": b}, path)
        assert (a.value, b.value) == expected


def test_loading_from_a_directory_skips_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, {"a": {"value": step}, "b": {"value": 0}})
    (tmp_path / "step-00000002" / "SHA256SUMS").unlink()
    a = Number()
    Checkpoint.load_objects({"a": a}, tmp_path)
    assert a.value == 1


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing"):
        Checkpoint.load_objects({"a": Number()}, tmp_path)


def test_nothing_is_loaded_if_an_object_is_missing() -> None:
    a, b = Number(), Number()
    with pytest.raises(ValueError, match=r"'b' from `to_load` is not found in the checkpoint; it holds \['a', 'c'\]"):
        Checkpoint.load_objects({"a": a, "b": b}, {"a": {"value": 1}, "c": {"value": 1}})
    assert a.value == 0


def test_strict_is_passed_to_modules() -> None:
    model, number = nn.Linear(2, 1), Number()
    checkpoint = {"model": {"weight": torch.ones(1, 2)}, "number": {"value": 3}}
    with pytest.raises(RuntimeError, match="Missing key"):
        Checkpoint.load_objects({"model": model, "number": number}, checkpoint)
    Checkpoint.load_objects({"model": model, "number": number}, checkpoint, strict=False)
    assert torch.equal(model.weight, torch.ones(1, 2))
    assert number.value == 3


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: nn.DataParallel(torch.compile(m))]
)
def test_a_wrapped_model_is_saved_and_loaded_as_the_bare_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    memory, model = Memory(), nn.Linear(2, 1)
    run(Checkpoint({"model": wrap(model)}, memory))
    state = memory.files["model_30.pt"]
    assert list(state) == ["weight", "bias"]
    bare, wrapped = nn.Linear(2, 1), nn.Linear(2, 1)
    Checkpoint.load_objects({"model": bare}, state)
    Checkpoint.load_objects({"model": wrap(wrapped)}, state)
    assert torch.equal(bare.weight, model.weight)
    assert torch.equal(wrapped.weight, model.weight)


def test_objects_may_be_nested() -> None:
    memory = Memory()
    run(Checkpoint({"pair": [Number(1), Number(2)], "named": {"x": Number(3)}}, memory))
    state = memory.files["checkpoint_30.pt"]
    assert state == {"pair": [{"value": 1}, {"value": 2}], "named": {"x": {"value": 3}}}
    pair, x = (Number(), Number()), Number()
    Checkpoint.load_objects({"pair": pair, "named": {"x": x}}, state)
    assert [pair[0].value, pair[1].value, x.value] == [1, 2, 3]
    for to_load in ({"pair": [Number()]}, {"named": {"y": Number()}}):
        with pytest.raises(ValueError, match="the checkpoint"):
            Checkpoint.load_objects({**to_load, "x": Number()}, {**state, "x": {"value": 0}})


# ---- memory


@pytest.mark.usefixtures("no_collector")
def test_an_engine_that_saves_itself_is_freed_by_reference_counting() -> None:
    trainer = Engine(lambda engine, batch: None)
    handler = Checkpoint({"trainer": trainer, "model": Number()}, Memory())
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(2), max_epochs=1)
    reference = weakref.ref(trainer)
    del trainer
    assert reference() is None
    with pytest.raises(CheckpointError, match=r"the engine to_save\['trainer'\] is gone; keep a reference"):
        run(handler)


# ---- bad arguments


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "expected to_save to be a dict of objects, got list", {"to_save": [Number()]}),
        (TypeError, r"to_save\['a'\]\[1\] to have a state_dict method, got int", {"to_save": {"a": [Number(), 1]}}),
        (ValueError, "expected at least one object", {"to_save": {}}),
        (TypeError, "expected save_handler to be a directory or callable, got int", {"save_handler": 1}),
        (TypeError, "expected score_function to be callable, got float", {"score_function": 0.5}),
        (TypeError, "expected global_step_transform to be callable, got int", {"global_step_transform": 1}),
        (ValueError, "expected n_saved to be at least 1, or None", {"n_saved": 0}),
        (ValueError, "cannot be filled in; use the fields", {"filename_pattern": "{epoch}.pt"}),
        (ValueError, "include_self=True takes", {"to_save": {"checkpointer": Number()}, "include_self": True}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        Checkpoint(**({"to_save": {"model": Number()}, "save_handler": Memory()} | arguments))


def test_a_wrong_argument_leaves_no_directory_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        Checkpoint({"model": 1}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "expected to_load to be a dict of objects, got list", ([Number()], {})),
        (TypeError, "expected a checkpoint that is a dict or a path, got int", ({"a": Number()}, 1)),
        (TypeError, r"to_load\['a'\] to have a load_state_dict method, got int", ({"a": 1}, {"a": 1})),
        (CheckpointError, "No such file", ({"a": Number()}, "absent.pt")),
    ],
)  # fmt: skip
def test_a_wrong_argument_of_load_objects_is_refused(error: type[Exception], match: str, arguments: Any) -> None:
    with pytest.raises(error, match=match):
        Checkpoint.load_objects(*arguments)


def test_called_outside_a_run_the_step_is_that_of_the_engine() -> None:
    memory = Memory()
    handler = Checkpoint({"model": Number()}, memory, n_saved=None)
    handler(Engine(lambda engine, batch: None))
    trainer = Engine(lambda engine, batch: None)
    trainer.run(range(4), max_epochs=3)
    handler(trainer)
    assert list(memory.files) == ["model_0.pt", "model_12.pt"]


def test_a_score_is_a_number_of_an_existing_metric() -> None:
    with pytest.raises(ValueError, match="expected score_function to return a number, got str"):
        run(Checkpoint({"model": Number()}, Memory(), score_function=lambda engine: "high"))
    with pytest.raises(ValueError, match=r"expected a metric 'loss' of this engine, got \['accuracy'\]"):
        run(Checkpoint({"model": Number()}, Memory(), score_name="loss"), scores=[1, 2, 3])
    with pytest.raises(ValueError, match=r"score_sign to be 1\.0 or -1\.0"):
        Checkpoint.get_default_score_fn("accuracy", 0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((True, False, False, False), "all names are the same"), ((True, False, True, True), "with_score=True")],
)
def test_a_pattern_gives_each_checkpoint_its_own_name(arguments: tuple[bool, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Checkpoint.setup_filename_pattern(*arguments)
    expected = "{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}"
    assert Checkpoint.setup_filename_pattern() == expected


def test_attach_returns_a_handle_that_detaches() -> None:
    memory, trainer = Memory(), Engine(lambda engine, batch: None)
    handle = Checkpoint({"model": Number()}, memory, n_saved=None).attach(trainer, Events.EPOCH_COMPLETED)
    trainer.run(range(2), max_epochs=1)
    handle.remove()
    trainer.run(range(2), max_epochs=2)
    assert list(memory.files) == ["model_2.pt"]


def test_an_ordered_state_keeps_its_type(tmp_path: Path) -> None:
    run(Checkpoint({"model": nn.Linear(1, 1)}, DiskSaver(tmp_path)), epochs=1)
    assert type(torch.load(tmp_path / "model_10.pt", weights_only=True)) is OrderedDict


def test_an_exception_saves_what_is_there(tmp_path):
    """The handler of EXCEPTION_RAISED gets the engine and the exception."""
    counter = torch.nn.Linear(1, 1)

    def step(engine, batch):
        if batch == 3:
            raise RuntimeError("on purpose")

    trainer = Engine(step)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, Checkpoint({"model": counter}, tmp_path))
    trainer.run([1, 2, 3, 4], max_epochs=1)  # a handler that does not raise has dealt with the exception
    assert [path.name for path in tmp_path.iterdir()] == ["model_3.pt"]
