"""The rows of a run's memory are the bytes that its tensors have, and the advice is what the fields say."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config, small_run
from torch import nn

from disttrain.config import Config
from disttrain.run.memory_table import (
    MemoryTable,
    advice,
    estimated_states,
    is_out_of_memory,
    known_memory,
    limit_of,
    states_of,
)

CPU = torch.device("cpu")
WIDTH = 3 * 4 + 4 + 4 + 4 + 4 + 1
"""The numbers of the parameters of the small run's model."""


def test_the_rows_are_the_bytes_of_the_run(tmp_path: Path) -> None:
    run = small_run(tmp_path, ema={"decay": 0.5}, num_slots=4)
    table = known_memory(run)
    assert table.rows == {
        "parameters": 4 * WIDTH,
        "parameters, gathered in a step": 0,
        "buffers": 4 * 8 + 8,
        "gradients": 4 * WIDTH,
        "gradients of slots until they meet": 2 * 4 * WIDTH,  # one rank runs four slots
        "states of SGD": 4 * WIDTH,
        "average of the weights (ema)": 4 * WIDTH,
    }
    assert table.num_samples == 2
    run.close()


def test_frozen_parameters_have_neither_gradients_nor_states(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).bfloat16()
        model[0].requires_grad_(False)
        return model

    run = small_run(tmp_path, model=frozen, ema={"decay": 0.5}, num_slots=1)
    rows = known_memory(run).rows
    assert (rows["parameters"], rows["gradients"]) == (2 * 21, 2 * 5)
    assert rows["average of the weights (ema)"] == 4 * 5  # in float32
    run.close()


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        partial(torch.optim.AdamW, amsgrad=True),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.ASGD,
    ],
)
def test_the_estimate_of_states_is_what_the_optimizer_then_has(optimizer: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    made = optimizer(model.parameters())
    estimate = estimated_states(made)
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    made.step()
    assert estimate == sum(each.nbytes for each in states_of(made))


def test_an_optimizer_without_a_copy_is_not_estimated() -> None:
    class Uncopied(torch.optim.SGD):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError

    made = Uncopied([nn.Parameter(torch.ones(2))], lr=0.1)
    made.lock = open  # type: ignore[attr-defined]
    made.generator = (each for each in ())  # type: ignore[attr-defined]
    assert estimated_states(made) == 0


def test_the_text_shares_the_memory_among_the_ranks_and_advises_when_it_is_tight() -> None:
    table = MemoryTable("the CPU", {"parameters": 400, "buffers": 0}, 100, 4, peak=900, process=50, limit=2000)
    table.advice = ["num_slots=8"]
    assert (table.needed, table.share) == (950, 0.475)
    assert table.text().splitlines() == [
        "memory of a rank on the CPU, 2.0 kB for 1 rank",
        "  parameters                               400 B",
        "  activations of a microbatch              100 B  4 samples, measured",
        "  the process beside tensors                50 B",
        "  a step at most, tensors alone            900 B  measured",
        "  together                                 950 B  48% of it",
    ]
    table.num_sharing = 2
    assert table.text().splitlines()[-2:] == ["to need less:", "  num_slots=8"]
    unknown = MemoryTable("hpu:0", {"parameters": 400})
    assert unknown.share is None
    assert "activations of a microbatch                  ?  --memory measures them" in unknown.text()


@pytest.mark.parametrize(
    ("changes", "world_size", "expected", "missing"),
    [
        (
            {},
            1,
            ["num_slots=4: microbatches of 2", "activation_checkpointing=", "precision=bf16", "strategy=fsdp and"],
            [],
        ),
        ({"num_slots": 8}, 2, ["strategy=fsdp: "], ["num_slots="]),
        ({"precision": "bf16", "activation_checkpointing": True}, 2, [], ["precision", "activation_checkpointing"]),
        ({"strategy": "fsdp"}, 2, ["fsdp_gather=module"], ["strategy"]),
        ({"strategy": "fsdp"}, 1, [], ["strategy", "fsdp_gather"]),
    ],
)
def test_the_advice_leaves_out_what_is_set(
    changes: dict[str, Any], world_size: int, expected: list[str], missing: list[str]
) -> None:
    config: Config = small_config(**changes)
    text = "\n".join(advice(config, world_size, CPU))
    assert all(each in text for each in expected)
    assert not any(each in text for each in missing)


def test_errors_of_memory_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    cause = ValueError("in a handler")
    cause.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    for error in (caught.value, MemoryError(), cause):
        assert is_out_of_memory(error)
    for other in (RuntimeError("size mismatch"), ValueError("out of memory"), None):
        assert not is_out_of_memory(other)


def test_the_limit_of_a_cpu_is_that_of_its_host() -> None:
    limit = limit_of(CPU)
    assert limit is None or limit > 2**28
    assert limit_of(torch.device("mps")) is None
