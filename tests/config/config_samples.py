"""A small cfg.py, its functions, and a Config of them, for the tests of the config."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from disttrain.config import Config
from disttrain.errors import ConfigError

CFG = """\
from functools import partial

from disttrain.config import Config


def net(width=32, depth: "int | None" = None, dropout: float = 0, act=print, kind="small", norm=True):
    raise AssertionError("reading a cfg.py builds nothing")


def data(root="here"):
    raise AssertionError("reading a cfg.py builds nothing")


def adam(parameters, lr=0.001, betas=(0.9, 0.999), *, weight_decay=0.0):
    raise AssertionError("reading a cfg.py builds nothing")


def loss(y_pred, y, smoothing=0.0):
    return y_pred - y


def accuracy(num_classes=2):
    raise AssertionError("reading a cfg.py builds nothing")


config = Config(
    seed=7,
    model=partial(net, width=64),
    train_data=data,
    loss=loss,
    optimizer=partial(adam, lr=0.01),
    metrics={"accuracy": partial(accuracy, num_classes=10)},
    global_batch_size=128,
    max_epochs=20,
)
"""


def net(
    width: int = 32,
    depth: int | None = None,
    dropout: float = 0.0,
    act: Any = print,
    kind: Literal["small", "large"] = "small",
    norm: bool = True,
    layers: tuple[int, ...] = (),
    untyped=None,  # type: ignore[no-untyped-def]  # a keyword without a type
) -> None:
    raise AssertionError("overriding builds nothing")


def data(root: str = "here", **options: Any) -> None:
    raise AssertionError("overriding builds nothing")


def adam(parameters: Any, lr: float = 0.001, betas: tuple[float, float] = (0.9, 0.999)) -> None:
    raise AssertionError("overriding builds nothing")


def loss(y_pred: Any, y: Any, smoothing: float = 0.0) -> Any:
    return y_pred - y


def accuracy(num_classes: int = 2) -> None:
    raise AssertionError("overriding builds nothing")


def sample(**changes: Any) -> Config:
    """Return a sound Config, with changes."""
    values: dict[str, Any] = {
        "model": net,
        "train_data": data,
        "loss": loss,
        "optimizer": partial(adam, lr=0.01),
        "metrics": {"accuracy": partial(accuracy, num_classes=10)},
        "global_batch_size": 128,
        "max_epochs": 20,
    }
    return Config(**{**values, **changes})


def refused(**changes: object) -> str:
    """Return the message with which a Config with these changes is refused."""
    with pytest.raises(ConfigError) as caught:
        sample(**changes)
    return str(caught.value)


def write_cfg(folder: Path, name: str = "digits.py", text: str = CFG) -> Path:
    """Write a cfg.py and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text)
    return file
