"""The configs of docs/optimizers.md train, resume and are exported; what the page says of groups is so."""

import re
import shutil
from pathlib import Path

import pytest
from commands import DIGITS, ROOT
from safetensors.torch import load_file

from disttrain.commands.checkpoint import main as checkpoint
from disttrain.commands.launch import main
from disttrain.config import load_config

PAGE = (ROOT / "docs" / "optimizers.md").read_text()
FILES = dict(re.findall(r"(?ms)^```python file=(\S+)\n(.*?)^```$", PAGE))
WORDS = ("max_epochs=none", "global_batch_size=16", "num_slots=2", "max_steps=4")

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_its_first_config_is_the_example() -> None:
    assert FILES["examples/groups.py"] == (ROOT / "examples" / "groups.py").read_text()


@pytest.mark.parametrize("path", FILES)
def test_its_configs_train_and_are_exported(tmp_path: Path, path: str) -> None:
    name = Path(path).name
    (tmp_path / name).write_text(FILES[path])
    shutil.copy(DIGITS, tmp_path)
    words = ("optimizer.weight_decay=0.05",) if name == "groups.py" else ()
    for _ in range(2):  # the second finds it completed
        assert main([str(tmp_path / name), *WORDS, *words, "--runs", str(tmp_path)]) == 0
    run = tmp_path / name.removesuffix(".py")
    assert checkpoint(["export", str(run), str(tmp_path / "model.safetensors")]) == 0
    model = load_config(tmp_path / name).model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_the_groups_of_its_second_config_have_rates_by_layer(tmp_path: Path) -> None:
    (tmp_path / "by_layer.py").write_text(FILES["by_layer.py"])
    shutil.copy(DIGITS, tmp_path)
    config = load_config(tmp_path / "by_layer.py")
    optimizer = config.optimizer(config.model())
    rates = [(round(group["lr"] / 2e-3, 6), group["weight_decay"]) for group in optimizer.param_groups]
    assert rates[:2] == [(1.0, 0.1), (1.0, 0.0)]  # the last layer: a weight and a bias
    assert rates[-2:] == [(0.32768, 0.1), (0.32768, 0.0)]  # the first of six: 0.8**5
