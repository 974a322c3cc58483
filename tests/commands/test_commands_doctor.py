"""`disttrain doctor`: the table that a bug report needs."""

from importlib.metadata import version
from io import StringIO

import pytest
import torch
from rich.console import Console

from disttrain import __version__
from disttrain.commands import doctor as module
from disttrain.commands.doctor import doctor


def table() -> dict[str, str]:
    """Return the printed rows: name to the rest of the line."""
    screen = StringIO()
    assert doctor(Console(file=screen, width=200)) == 0
    names = ("backend gloo", "backend nccl")
    rows = {}
    for line in screen.getvalue().splitlines():
        name = next((name for name in names if line.startswith(name)), line.split()[0])
        rows[name] = line.removeprefix(name).strip()
    return rows


def test_it_prints_versions_devices_and_backends() -> None:
    rows = table()
    assert rows["disttrain"] == __version__
    assert {name: rows[name] for name in ("torch", "numpy", "pydantic", "rich", "torchmetrics")} == {
        name: version(name) for name in ("torch", "numpy", "pydantic", "rich", "torchmetrics")
    }
    assert int(rows["cores"]) >= 1
    assert rows["python"]
    assert rows["backend gloo"] == "yes"
    assert rows["backend nccl"] == ("yes" if torch.distributed.is_nccl_available() else "no")
    accelerator = torch.accelerator.current_accelerator()
    assert rows["accelerator"].endswith("none" if accelerator is None else accelerator.type)


def test_it_prints_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("a-package-that-nobody-has",))
    assert table()["a-package-that-nobody-has"] == "not installed"
