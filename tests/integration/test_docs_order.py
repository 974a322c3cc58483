"""The configs and the commands of docs/order.md run, and their batches are those that the page describes."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DIGITS, ROOT, launch, result

from disttrain.commands.launch import main
from disttrain.config import load_config
from disttrain.data import SlotBatchSampler, Sources

PAGE = (ROOT / "docs/order.md").read_text()
FILES = dict(re.findall(r"(?ms)^```python file=(\w+\.py)\n(.*?)^```$", PAGE))

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(DIGITS, tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def batches_of(file: Path) -> tuple[SlotBatchSampler, Any]:
    """Return the sampler of a config, and the digit at each index of its data."""
    config = load_config(file)
    data = config.train_data()
    assert config.order is not None
    if isinstance(data, dict):
        data = Sources(data)
    size = config.global_batch_size
    labels = np.array([int(data[i][1]) for i in range(len(data))])
    return SlotBatchSampler(len(data), size, 8, seed=7, order=config.order(data, 7, size)), labels


def test_an_order_of_ones_own_has_ten_lines(folder: Path) -> None:
    (lines,) = re.findall(r"(?ms)^class EasyFirst.*?(?=^config)", FILES["easy_first.py"])
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    sampler, _ = batches_of(folder / "easy_first.py")
    data = load_config(folder / "easy_first.py").train_data()
    ink = data.data.tensors[0].sum((1, 2, 3)).numpy()
    first = ink[sampler.samples(0, range(14)).ravel()]
    assert np.all(np.diff(first) >= 0)
    assert not np.all(np.diff(ink[sampler.samples(1, range(14)).ravel()]) >= 0)


def test_the_mixture_has_the_shares_of_the_page(folder: Path) -> None:
    sampler, labels = batches_of(folder / "mixed.py")
    steps = range(sampler.num_steps)
    assert len(steps) == 1437 // 96
    odd = labels[np.concatenate([sampler.samples(epoch, steps) for epoch in range(4)])].reshape(-1) % 2
    until = np.arange(1, 30 * 96 + 1)
    assert np.all(np.abs(np.cumsum(odd[: 30 * 96]) - 0.3 * until) < 1)
    later = odd[30 * 96 :]
    assert np.all(np.abs(np.cumsum(later) - 0.5 * np.arange(1, len(later) + 1)) < 1)


def test_the_balanced_classes_come_equally_often(folder: Path) -> None:
    sampler, labels = batches_of(folder / "balanced.py")
    drawn = Counter(labels[np.concatenate([sampler.samples(e, range(14)) for e in range(10)]).ravel()].tolist())
    assert sorted(drawn) == list(range(10))
    assert all(abs(count / 1344 - 1) < 0.15 for count in drawn.values())


@pytest.mark.parametrize(
    "name", ["easy_first", *(pytest.param(each, marks=pytest.mark.slow) for each in ("balanced", "by_length"))]
)
def test_each_config_of_the_page_has_the_same_bits_resumed(name: str, folder: Path) -> None:
    words = ("schedule=none", "valid_data=none", "max_epochs=none", "ledger.every_steps=1")
    words = (*words, "global_batch_size=48", "num_slots=2", "--runs", str(folder))
    for run, steps in (("whole", 3), ("cut", 2), ("cut", 3)):
        assert main([str(folder / f"{name}.py"), *words, f"name={run}", f"max_steps={steps}"]) == 0
    whole, cut = ((folder / run / "ledger.jsonl").read_text() for run in ("whole", "cut"))
    assert whole == cut


@pytest.mark.slow
def test_the_commands_of_the_page_train_and_resume(folder: Path) -> None:
    (commands,) = re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)
    for line in [*commands.splitlines(), "-m disttrain.launch mixed.py name=whole"]:
        words = line.partition("disttrain.launch ")[2].split()
        ranks = int((re.findall(r"--nproc-per-node (\d)", line) or ["0"])[0])
        done = launch(*words, ranks=ranks, cwd=folder)
        assert done.code == 0, done.text
    whole, resumed = (result(folder / "runs" / name) for name in ("whole", "mixed"))
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert resumed["world_size"] == 3
    refused = launch("mixed.py", "max_steps=60", "order.shares.odd=0.4", cwd=folder)
    assert refused.code == 2
    assert "order.shares.odd: 0.3 in the run, 0.4 now" in refused.text
