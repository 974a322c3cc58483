"""The functions of a config are checked for what they give to each other, in training and in evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_run import small_config, trained
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain.errors import ConfigError
from disttrain.run.step_checks import CheckedStep, checked_forward, checked_loss, pairs_of

X, Y = torch.zeros(8, 3), torch.zeros(8, 1)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Unpacks:
    def __iter__(self) -> Any:
        return iter((X, Y))


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y), Unpacks(), (["a word"], Y)])
def test_a_pair_passes(batch: Any) -> None:
    x, y = pairs_of(small_config())(batch)
    assert y is Y
    assert x is X or x == ["a word"]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "y": Y}, "a dict with the keys 'x', 'y'"),
        (X[:2], r"float32\[2, 3\]"),
        ([X, Y, Y], r"a list of 3 \(float32\[8, 3\], float32\[8, 1\], float32\[8, 1\]\)"),
        ("xy", "'xy'"),
        (3, "3"),
    ],
)
def test_another_batch_is_named_with_the_way_out(batch: Any, words: str) -> None:
    expected = (
        rf"^train_data \(.*small_run.py:\d+\): expected samples \(x, y\), got a batch that is {words}; return pairs"
    )
    with pytest.raises(ConfigError, match=expected):
        pairs_of(small_config())(batch)


def test_a_batch_without_the_dimension_of_the_batch_is_named() -> None:
    config = small_config(collate=lambda samples: samples[0])
    with pytest.raises(
        ConfigError, match=r"^collate \(.*step_checks.py:\d+\): .* got one number as y; keep the batch's"
    ):
        pairs_of(config)((X[0], Y[0, 0]))


def forward_returns(value: Any) -> Callable[..., Any]:
    forward = lambda model, batch: value  # noqa: E731
    return checked_forward(small_config(loss=None, forward=forward), forward)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"loss": X.mean()}, "a dict with the keys 'loss'; return two things"),
        (X.mean(), r"float32\[\]; return two things"),
        (None, "None; return two things"),
        ((X.mean(), X, {}, Y), r"a tuple of 4 .*; return two things"),
        ((X, Y), r"a loss that is a tensor of one number, got float32\[8, 3\]; reduce it, by .mean"),
        ((3.5, None), "a loss that is a tensor of one number, got 3.5; return what .mean"),
    ],
)
def test_a_forward_must_return_a_loss_and_outputs(value: Any, words: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^forward \(.*step_checks.py:\d+\): expected (\(loss, outputs\), got )?{words}"
    ):
        forward_returns(value)(nn.Identity(), X)


def test_a_loss_of_one_number_passes_as_a_scalar() -> None:
    loss, outputs, values = forward_returns((torch.ones(1, 1), "outputs"))(nn.Identity(), X)
    assert (loss.shape, loss.item(), outputs, values) == ((), 1.0, "outputs", {})


def test_a_third_result_is_a_dict_of_values() -> None:
    assert forward_returns((X.mean(), None, {"ce": 2.0}))(nn.Identity(), X)[2] == {"ce": 2.0}
    with pytest.raises(
        ConfigError, match=r"^forward .*expected \(loss, outputs, values\) with a dict .*float32\[8, 1\]"
    ):
        forward_returns((X.mean(), X, Y))(nn.Identity(), X)


@pytest.mark.parametrize("value", [None, X, 0.5])
def test_a_loss_must_return_one_number(value: Any) -> None:
    loss = lambda y_pred, y: value  # noqa: E731
    with pytest.raises(ConfigError, match=r"^loss \(.*step_checks.py:\d+\): expected a tensor of one number"):
        checked_loss(small_config(loss=loss), loss)(X, Y)


def test_an_error_of_the_loss_says_what_it_got() -> None:
    with pytest.raises(TypeError) as caught:
        checked_loss(small_config(), nn.CrossEntropyLoss())((X, None), Y)
    assert caught.value.__notes__ == [
        "the loss got y_pred, a tuple of 2 (float32[8, 3], NoneType), and y, float32[8, 1]"
    ]


class Dicts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(3), "y": torch.zeros(1)}


@pytest.mark.parametrize("field", ["train_data", "valid_data"])
def test_a_run_checks_its_batches_in_training_and_in_evaluation(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train_data.*: expected samples \(x, y\), got a batch that is a dict"):
        trained(tmp_path, **{field: Dicts})


def test_a_step_checks_what_forward_returns_and_keeps_its_parts_once() -> None:
    forward = lambda model, batch: batch[0].mean()  # noqa: E731
    step = CheckedStep(small_config(loss=None, forward=forward), nn.Linear(3, 1), None, forward)
    with pytest.raises(ConfigError, match=r"^forward .*expected \(loss, outputs\), got float32"):
        step((X, Y))
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    whole = CheckedStep(small_config(loss=loss), nn.Linear(3, 1), loss, None)
    assert list(whole.state_dict()) == ["model.weight", "model.bias", "loss.weight"]
