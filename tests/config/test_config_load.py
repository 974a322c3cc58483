"""A cfg.py runs once, and its functions can be sent to workers. A bad one is one message, and changes nothing."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_samples import CFG, write_cfg
from torch.utils.data import DataLoader

from disttrain.config import describe, load_config, to_json
from disttrain.errors import ConfigError
from disttrain.seeding import manual_seed


@pytest.fixture(autouse=True)
def restored(tmp_path: Path) -> Iterator[None]:
    """Restore the path and the modules of this process after each test."""
    path = sys.path[:]
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def refused(path: Path | str, *overrides: str) -> str:
    before, names = sys.path[:], set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert sys.path == before
    assert not [name for name in set(sys.modules) - names if name.startswith(("digits", "cfg"))]
    return str(caught.value)


def run_directory(folder: Path, file: Path, *overrides: str) -> Path:
    """Write the files in which a run keeps its config."""
    write_cfg(folder, "cfg.py", file.read_text())
    (folder / "config.json").write_text(to_json(load_config(file, overrides)))
    (folder / "overrides.json").write_text(json.dumps(overrides))
    return folder


def test_a_cfg_is_loaded_with_its_stem_as_name(tmp_path: Path) -> None:
    config = load_config(write_cfg(tmp_path), ["optimizer.lr=0.5"])
    assert (config.name, config.seed, config.optimizer.keywords) == ("digits", 7, {"lr": 0.5})  # type: ignore[attr-defined]
    assert config.origin is not None
    assert (config.origin.file, config.origin.folder) == (tmp_path / "digits.py", tmp_path)
    assert config.origin.overrides == ("optimizer.lr=0.5",)


def test_a_cfg_draws_the_same_numbers_each_time_and_changes_no_generator(tmp_path: Path) -> None:
    drawing = "import random, numpy, torch\nDRAWN = random.random(), numpy.random.rand(), torch.rand(()).item()\n"
    path = write_cfg(tmp_path, text=drawing + CFG + "\nnumpy.random.seed(5), torch.manual_seed(5), random.seed(5)\n")
    drawn = []
    for seed, other in [(1, ["seed=1"]), (2, ["seed=2"])]:
        manual_seed(seed)
        module = load_config(path, other).origin.module  # type: ignore[union-attr]
        drawn.append(sys.modules[module].DRAWN)  # type: ignore[attr-defined]
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == three_draws(seed)
    assert drawn[0] == drawn[1]
    assert drawn[0] not in (three_draws(1), three_draws(2), three_draws(5))
    path.write_text(drawing + "raise ValueError")
    manual_seed(3)
    refused(path)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == three_draws(3)


def three_draws(seed: int) -> tuple[float, float, float]:
    manual_seed(seed)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_it_imports_its_neighbours(tmp_path: Path) -> None:
    write_cfg(tmp_path, "neighbour_of_cfg.py", "size = 12\n")
    text = CFG.replace("config = ", "from neighbour_of_cfg import size\nconfig = ").replace("width=64", "width=size")
    assert load_config(write_cfg(tmp_path, text=text)).model.keywords == {"width": 12}  # type: ignore[attr-defined]


def test_no_bytecode_is_written_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    load_config(write_cfg(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["digits.py"]


SQUARES = """
class Squares:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index * index


def listed(samples):
    return list(samples)


config = replace(config, train_data=Squares, collate=listed)
"""


def test_functions_travel_to_spawned_loader_workers(tmp_path: Path) -> None:
    text = CFG.replace("import Config", "import Config, replace") + SQUARES
    config = load_config(write_cfg(tmp_path, "squares_cfg.py", text))
    data: Any = config.train_data()
    loader = DataLoader(data, num_workers=1, multiprocessing_context="spawn", collate_fn=config.collate, batch_size=2)
    assert list(loader) == [[0, 1], [4, 9]]


@pytest.mark.parametrize("name", ["random.py", "json.py", "pytest.py", "v1.2.py"])
def test_a_name_that_is_taken_hides_nothing(tmp_path: Path, name: str) -> None:
    before = dict(sys.modules)
    config = load_config(write_cfg(tmp_path, name))
    assert config.name == name.removesuffix(".py")
    assert {key: sys.modules[key] for key in before} == before
    assert describe(config)["train_data"] == "cfg.data"


def test_two_of_one_name_and_one_loaded_twice(tmp_path: Path) -> None:
    first = write_cfg(tmp_path / "a", "same_cfg.py")
    second = write_cfg(tmp_path / "b", "same_cfg.py", CFG.replace("seed=7", "seed=8"))
    assert [load_config(path).seed for path in (first, second, first, first)] == [7, 8, 7, 7]
    first.write_text(CFG.replace("seed=7", "seed=9"))
    assert load_config(first).seed == 9
    assert sys.modules["same_cfg"].__file__ == str(first)


def test_a_run_directory_brings_its_name_its_overrides_and_its_neighbours(tmp_path: Path) -> None:
    write_cfg(tmp_path / "src", "neighbour_of_run.py", "size = 12\n")
    text = CFG.replace("config = ", "from neighbour_of_run import size\nconfig = ").replace("width=64", "width=size")
    file = write_cfg(tmp_path / "src", "numbers_cfg.py", text)
    run = run_directory(tmp_path / "runs" / "numbers_cfg", file, "seed=1", "max_epochs=3")
    original = load_config(file, ["seed=1", "max_epochs=3"])
    sys.path.remove(str(tmp_path / "src"))
    del sys.modules["neighbour_of_run"]
    config = load_config(run)
    assert describe(config) == describe(original)
    later = load_config(run, ["max_epochs=5"])
    assert (later.name, later.seed, later.max_epochs) == ("numbers_cfg", 1, 5)
    assert later.origin is not None
    assert later.origin.overrides == ("seed=1", "max_epochs=3", "max_epochs=5")
    assert to_json(config) == to_json(original)


def test_no_such_file_names_the_nearest(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    for wrong in ("digit.py", "digits"):
        assert refused(tmp_path / wrong) == f"{tmp_path / wrong}: no such file; did you mean {tmp_path}/digits.py?"
    assert "no such file; expected a cfg.py or a run directory." in refused(tmp_path / "nowhere" / "x.py")


def test_the_cfg_and_the_overrides_of_an_older_launch_take_the_place_of_the_newest(tmp_path: Path) -> None:
    run = run_directory(tmp_path, write_cfg(tmp_path), "seed=8")
    kept = tmp_path / "launches" / "cfg.py"
    kept.parent.mkdir()
    kept.write_text(CFG.replace("seed=7", "seed=7, max_steps=11, max_epochs=None").replace("max_epochs=20,", ""))
    config = load_config(run, ["num_workers=2"], kept=(kept, ["global_batch_size=64"]))
    assert (config.seed, config.max_steps, config.global_batch_size, config.num_workers) == (7, 11, 64, 2)
    assert config.name == load_config(run).name
    assert config.origin is not None
    assert (config.origin.file, config.origin.text) == (kept.resolve(), kept.read_bytes())


def test_a_directory_that_is_no_run_directory(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    message = refused(tmp_path)
    assert "expected a cfg.py, or a run directory, which holds cfg.py and config.json; got another directory" in message
    assert "it has digits.py." in message


def test_another_kind_of_file(tmp_path: Path) -> None:
    message = refused(write_cfg(tmp_path, "digits.yaml", "a: 1"))
    assert "expected a Python file whose name ends in .py" in message
    assert "File name too long" in refused(tmp_path / ("x" * 300 + ".py"))


def test_a_syntax_error_shows_file_line_and_place(tmp_path: Path) -> None:
    file = write_cfg(tmp_path, text="x = 1\ndef net():\n    if x\n        pass\n")
    first, line, caret = refused(file).splitlines()
    assert first.startswith(f"{file}, line 3: SyntaxError: ")
    assert (line.strip(), caret.index("^")) == ("if x", line.index("x") + 1)


def test_a_syntax_error_of_a_neighbour_names_the_neighbour(tmp_path: Path) -> None:
    neighbour = write_cfg(tmp_path, "broken_neighbour.py", "x = = 1\n")
    assert f"{neighbour}, line 1: SyntaxError" in refused(write_cfg(tmp_path, text="import broken_neighbour\n"))


@pytest.mark.parametrize("text", ["x = '\0'\n", "x = '\udcff'\n"])
def test_a_file_that_is_no_text(tmp_path: Path, text: str) -> None:
    file = tmp_path / "digits.py"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert refused(file).startswith(str(file))


def test_an_exception_shows_the_line_of_the_cfg(tmp_path: Path) -> None:
    file = write_cfg(tmp_path, text="import json\n\njson.loads('{')\n")
    first, line, deeper = refused(file).splitlines()
    assert first.startswith(f"{file}, line 3: JSONDecodeError: Expecting property name")
    assert line == "    json.loads('{')"
    assert "decoder.py" in deeper


def test_a_class_that_is_called_where_a_partial_belongs(tmp_path: Path) -> None:
    for call, name in (("Mixture({'web': 1})", "Mixture"), ("Weighted(weights=[1])", "Weighted")):
        message = refused(write_cfg(tmp_path, text=f"from disttrain.data import *\norder = {call}\n"))
        assert f"line 2: TypeError: {name}.__init__() missing" in message
        assert (
            f"; if a field of the Config is to build it during the run, write partial({name}, KEYWORD=...)" in message
        )


def test_a_missing_module_and_an_exit(tmp_path: Path) -> None:
    missing = refused(write_cfg(tmp_path, text="import no_such_thing\n"))
    assert "line 1: ModuleNotFoundError: No module named 'no_such_thing'" in missing
    assert "line 1: SystemExit: 3" in refused(write_cfg(tmp_path, text="raise SystemExit(3)\n"))


def test_a_config_that_is_refused_shows_its_line(tmp_path: Path) -> None:
    file = write_cfg(tmp_path, text=CFG.replace("seed=7", "sed=7"))
    line = CFG.splitlines().index("config = Config(") + 1
    assert refused(file) == f"{file}, line {line}: sed: no such field; did you mean seed?"
    several = refused(write_cfg(tmp_path, text=CFG.replace("seed=7", "sed=7, max_steps=0"))).splitlines()
    assert several[0] == f"{file}, line {line}:"
    assert several[1:] == [
        "  max_steps: expected int > 0 | None, got 0.",
        "  sed: no such field; did you mean seed?",
    ]


def test_no_config_or_another_thing_of_that_name(tmp_path: Path) -> None:
    assert "expected a Config named config, got none; end it in" in refused(write_cfg(tmp_path, text="x = 1\n"))
    assert "expected a Config named config, got a dict" in refused(write_cfg(tmp_path, text="config = {}\n"))
    renamed = refused(write_cfg(tmp_path, text=CFG.replace("config = ", "cfg = ")))
    assert "got none; rename cfg to config." in renamed


def test_a_refused_override_leaves_the_message_alone(tmp_path: Path) -> None:
    assert refused(write_cfg(tmp_path), "optimzer.lr=3").endswith("did you mean optimizer.lr?")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json: expected the JSON that a run writes, got JSONDecodeError"),
        ("config.json", "[]", "config.json: expected the JSON that a run writes, got TypeError"),
        ("overrides.json", "{", "overrides.json: expected a JSON list of KEY=VALUE, got no JSON"),
        ("overrides.json", '[1, "a=2"]', "overrides.json: expected a JSON list of KEY=VALUE, got [1, 'a=2']"),
        ("overrides.json", '"a=2"', "overrides.json: expected a JSON list of KEY=VALUE, got a=2"),
    ],
)
def test_a_damaged_run_directory(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = run_directory(tmp_path / "run", write_cfg(tmp_path))
    (run / file).write_text(text)
    assert message in refused(run)
