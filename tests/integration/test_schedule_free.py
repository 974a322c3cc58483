"""A schedule-free optimizer: the same bits when killed, resized and sharded; what was evaluated is what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from resized import run_resized
from torch import Tensor

from disttrain.checkpoint import committed, export, load
from disttrain.commands.compare import compare_runs
from disttrain.commands.main import main
from disttrain.config import load_config
from disttrain.run.directory import RunDirectory

CFG = Path(__file__).parent / "matrix" / "schedule_free.py"


def loss_of(weights: dict[str, Tensor]) -> float:
    """Return the validation loss of these weights, in a few lines of torch."""
    config: Any = load_config(CFG)
    model = config.model()
    model.load_state_dict(weights)
    x, y = config.valid_data().tensors
    with torch.no_grad():
        loss: float = config.loss(model(x), y).item()
    return loss


def exported(run: RunDirectory) -> dict[str, dict[str, Tensor]]:
    """Return the exported weights of all checkpoints of a run, by their names."""
    weights = {}
    for name in committed(run.checkpoints):
        file = run.path / f"{name}.safetensors"
        assert export(run.checkpoints / name, file).evaluation_point
        weights[name] = safetensors.torch.load_file(file)
    return weights


def test_what_is_evaluated_is_exported_and_what_is_trained_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, *others = run_resized(CFG, tmp_path)
    expected = exported(reference)
    for run in others:
        compared = compare_runs(reference, run)
        assert compared.same, compared.difference
        for name, weights in exported(run).items():
            assert all(torch.equal(weights[key], value) for key, value in expected[name].items())
    # The best evaluation is the loss of what --best exports, and not that of the weights that are trained.
    best = json.loads(reference.result_json.read_text())["best"]
    main(["checkpoint", "export", "--best", str(reference.path), str(tmp_path / "best.safetensors")])
    assert "the parameters at the optimizer's evaluation point" in capsys.readouterr().out
    assert loss_of(safetensors.torch.load_file(tmp_path / "best.safetensors")) == pytest.approx(best["value"], rel=1e-6)
    trained = load(reference.checkpoints / best["checkpoint"]).state["model"]
    assert abs(loss_of(trained) - best["value"]) > 1e-3 * best["value"]
