"""A run resumes with the state of its checkpoint; a part that only one of the two has gives a warning."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, net, points, printed, small_run, trained
from torch import Tensor

from disttrain.checkpoint import CheckpointInfo, save
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError, DataError
from disttrain.parallel.counterparts import Counterparts
from disttrain.run.resume import on_devices, restore, to_save
from disttrain.run.state import Run


class Average:
    """An average of the weights that begins with its first step."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}

    def update(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.shadow.setdefault(name, parameter.detach().clone()).lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = dict(state["shadow"])


class Averaging:
    """A handler with an average, which the run keeps or not."""

    __name__ = "averaging"

    def __init__(self, kept: bool = True) -> None:
        self.average = Average()
        self.kept = kept

    def __call__(self, trainer: Engine, run: Run) -> None:
        if self.kept:
            run.keep("average", self.average)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.average.update(run.model))


def hexes(average: Average) -> dict[str, list[str]]:
    return {name: [value.hex() for value in tensor.flatten().tolist()] for name, tensor in average.shadow.items()}


def test_a_new_run_begins_at_step_0(tmp_path: Path) -> None:
    to = console()
    run = small_run(tmp_path)
    assert restore(run, to) == 0
    assert printed(to) == ""


def test_a_kept_average_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, stopped, resumed = Averaging(), Averaging(), Averaging()
    trained(tmp_path / "whole", max_epochs=3, handlers=[whole])
    trained(tmp_path / "cut", max_epochs=1, handlers=[stopped])
    to = console()
    trained(tmp_path / "cut", to, max_epochs=3, handlers=[resumed])
    assert "resuming from step 4" in printed(to)
    assert "WARNING" not in printed(to)
    assert hexes(resumed.average) == hexes(whole.average) != hexes(stopped.average)


def test_a_compiled_model_and_a_compiled_kept_object_are_resumed(tmp_path: Path) -> None:
    def compiled_net() -> Any:
        return torch.compile(net(), backend="eager")

    def keeping(trainer: Engine, run: Run) -> None:
        copy = run.keep("copy", compiled_net())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: copy.load_state_dict(run.model.state_dict()))

    whole = trained(tmp_path / "whole", model=compiled_net, max_epochs=2, handlers=[keeping])
    trained(tmp_path / "cut", model=compiled_net, max_epochs=1, handlers=[keeping])
    to = console()
    resumed = trained(tmp_path / "cut", to, model=compiled_net, max_epochs=2, handlers=[keeping])
    assert "resuming from step 4" in printed(to)
    assert resumed["params_sha256"] == whole["params_sha256"]


def test_an_object_that_is_not_kept_gives_a_warning_before_the_first_step(tmp_path: Path) -> None:
    to = console()
    trained(tmp_path, to, max_epochs=1, handlers=[Averaging(kept=False)])
    assert "averaging.average (Average) has a state that no checkpoint holds" in printed(to)


def test_a_checkpoint_without_the_kept_object_or_with_more_gives_a_warning(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1, handlers=[Averaging(kept=False)])
    to = console()
    trained(tmp_path, to, max_epochs=2, handlers=[Averaging()])
    assert "WARNING: the checkpoint holds no 'average', which a handler keeps: it begins anew" in printed(to)
    to = console()
    trained(tmp_path, to, max_epochs=3)
    assert "WARNING: the checkpoint holds 'average', which no handler keeps now: its state is dropped" in printed(to)


def test_a_state_that_cannot_be_loaded_is_a_config_error(tmp_path: Path) -> None:
    class Forgetful(Average):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("weights")

    trained(tmp_path, max_epochs=1, handlers=[Averaging()])
    broken = Averaging()
    broken.average = Forgetful()
    with pytest.raises(ConfigError, match=r"^run.keep\('average', ...\): KeyError while its state was loaded"):
        trained(tmp_path, max_epochs=2, handlers=[broken])


def test_a_state_that_cannot_be_saved_is_a_config_error_before_the_first_step(tmp_path: Path) -> None:
    broken = Averaging()
    broken.average.shadow = {"rate": object()}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"^run.keep\('average', ...\): its state cannot be saved: .*rate"):
        trained(tmp_path, handlers=[broken])
    assert not (tmp_path / "small").exists()


def test_an_object_that_cannot_be_saved_leaves_the_old_run_in_its_place(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1)
    broken = Averaging()
    broken.average.shadow = {"rate": object()}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="its state cannot be saved"):
        trained(tmp_path, fresh=True, handlers=[broken])
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    to = console()
    trained(tmp_path, to, max_epochs=2)
    assert "resuming from step 4" in printed(to)


def test_user_keys_that_a_checkpoint_lacks_begin_anew(tmp_path: Path) -> None:
    def counts(trainer: Engine, run: Run) -> None:
        trainer.state.tokens = 7  # type: ignore[attr-defined]
        trainer.state_dict_user_keys.append("tokens")
        trainer.add_event_handler(Events.COMPLETED, lambda engine: tokens.append(engine.state.tokens))

    tokens: list[int] = []
    trained(tmp_path, max_epochs=1)
    to = console()
    trained(tmp_path, to, max_epochs=2, handlers=[counts])
    assert "WARNING: the checkpoint holds no state.tokens" in printed(to)
    assert tokens == [7]


def test_other_data_and_a_shorter_run_are_refused(tmp_path: Path) -> None:
    num_samples = [32]

    def data() -> Any:
        return points(num_samples[0])

    trained(tmp_path, max_epochs=2, train_data=data)
    with pytest.raises(ConfigError, match="the run stands at step 8, beyond the 4 steps"):
        trained(tmp_path, max_epochs=1, train_data=data)
    num_samples[0] = 40
    with pytest.raises(DataError, match="the training data has changed since the run began"):
        trained(tmp_path, train_data=data)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=2)
    [newest] = (tmp_path / "small" / "checkpoints").glob("step-00000008")
    (newest / "tensors.safetensors").write_bytes(b"nothing")
    to = console()
    trained(tmp_path, to, max_epochs=3)
    assert "WARNING: checkpoint step-00000008 is damaged" in printed(to)
    assert "resuming from step 4" in printed(to)


def test_the_parts_of_a_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path, schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert list(to_save(run)) == ["model", "optimizer", "trainer", "precision", "schedule"]
    run.keep("average", Average())
    assert list(to_save(run)["kept"]) == ["average"]


def test_loaded_tensors_move_to_the_device_of_their_counterparts(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    average = Average()
    average.shadow = {"0.weight": torch.empty(4, 3, device="meta")}
    run.keep("average", average)
    counterparts = Counterparts(run.parts, run.optimizer, run.kept)
    saved = {"shadow": {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}, "rates": [torch.ones(2), 0.5]}
    moved = on_devices(saved, counterparts, "kept.average")
    assert moved["shadow"]["0.weight"].device.type == "meta"  # the device of the present state
    assert moved["shadow"]["0.bias"].device.type == "cpu"  # the device of the parameter of that name
    assert moved["rates"][0] is saved["rates"][0]
    assert moved["rates"][1] == 0.5


def test_a_copied_run_directory_is_resumed(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", max_epochs=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = (trained(tmp_path / name, max_epochs=2) for name in "ab")
    assert a["params_sha256"] == b["params_sha256"] != first["params_sha256"]


@pytest.mark.parametrize("state", [{"model": {"a": torch.ones(1)}}, [torch.ones(1)], {}])
def test_a_checkpoint_that_no_run_saved_is_one_clear_error(tmp_path: Path, state: Any) -> None:
    info = CheckpointInfo(position=small_run(tmp_path).data)
    save(tmp_path / "small" / "checkpoints", 3, state, info=info)
    (tmp_path / "small" / ".lock").touch()
    with pytest.raises(CheckpointError, match=r"^expected the checkpoint of a run, got one without ") as caught:
        trained(tmp_path)
    assert "\n" not in str(caught.value)
