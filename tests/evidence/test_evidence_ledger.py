"""The ledger has the same text on any number of ranks, holds every number, and names differences between ranks."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import Tensor

from disttrain.backend import Backend, connect
from disttrain.data import StepBatch
from disttrain.engine import Engine, Events
from disttrain.errors import DisttrainError
from disttrain.evidence import Ledger, read_ledger
from disttrain.parallel import Slots

NUM_SLOTS, NUM_STEPS = 6, 7


def run_with(backend: Backend, path: Path, *, start: int = 0, broken_rank: int = -1) -> str:
    """Run an engine that adds each step's number to a weight, with losses by step and slot; return the ledger."""
    slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
    weight = torch.full((3,), float(sum(range(start + 1))))

    def step(engine: Engine, batch: list[Tensor]) -> list[Tensor]:
        weight.add_(engine.state.iteration)
        if backend.rank == broken_rank and engine.state.iteration == 4:
            weight[1] += 1
        return [x.mean() for x in batch]

    def batch_at(at: int) -> StepBatch:
        drawn = [torch.randn(5, generator=torch.Generator().manual_seed(100 * at + s)) for s in slots.mine]
        return StepBatch(drawn, epoch=at // 5, step=at % 5, slots=slots.mine)

    ledger = Ledger(
        path,
        start or -1,
        backend=backend,
        every_steps=3,
        state=lambda: {"model.weight": weight, "optimizer.weight.momentum": 2 * weight},
        order=lambda epoch, steps: np.array([[epoch, step] for step in steps]),
    )
    engine = Engine(step)
    engine.load_state_dict({"iteration": start, "epoch_length": NUM_STEPS, "max_epochs": 1})
    ledger.attach(engine)
    seen = [start]

    @engine.on(Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED)
    def fetch() -> None:
        steps = range(seen[-1] + 1, engine.state.iteration + 1)
        seen.append(engine.state.iteration)
        ledger.fetched([line_of(s) for s in steps])

    def line_of(s: int) -> dict[str, Any]:
        norm = None if s == 2 else 1 / s
        line = {"step": s, "loss": math.nan if s == 5 else 1 / s, "grad_norm": norm, "learning_rate": 0.1}
        return line | ({"loss": None, "left_out": "it was bad"} if s == 2 else {})

    try:
        engine.run([batch_at(at) for at in range(start + 1, NUM_STEPS + 1)], max_epochs=1, epoch_length=NUM_STEPS)
    except DisttrainError as error:
        return str(error)
    finally:
        ledger.close()
    return path.read_text() if backend.rank == 0 else ""


def test_the_text_is_the_same_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    texts = {ranks(world_size, run_with, tmp_path / str(world_size))[0] for world_size in (1, 2, 3)}
    assert len(texts) == 1
    lines = [json.loads(line) for line in texts.pop().splitlines()]
    assert [line["step"] for line in lines] == list(range(NUM_STEPS + 1))
    assert [line["step"] for line in lines if "state" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "slots" in line] == [3, 6]
    for line in lines[1:]:
        assert line.get("left_out") == ("it was bad" if line["step"] == 2 else None)
        if line["step"] == 2:
            assert line["loss"] is line["grad_norm"] is None
        else:
            loss, norm = float.fromhex(line["loss"]), float.fromhex(line["grad_norm"])
            assert math.isnan(loss) if line["step"] == 5 else loss == 1 / line["step"]
            assert norm == 1 / line["step"]
        assert float.fromhex(line["learning_rate"]) == 0.1
    for at, line in enumerate(lines[1:], start=1):
        indices = np.array([at // 5, at % 5], dtype="<i8")
        assert line["order"] == hashlib.blake2b(indices.tobytes(), digest_size=8).hexdigest()
    details = lines[3]["slots"]
    assert len(set(details["batch"])) == len(set(details["loss"])) == NUM_SLOTS
    drawn = [torch.randn(5, generator=torch.Generator().manual_seed(300 + s)).mean().item() for s in range(NUM_SLOTS)]
    assert [float.fromhex(loss) for loss in details["loss"]] == drawn


def test_a_resumed_run_goes_on_with_the_lines(tmp_path: Path) -> None:
    with connect("single") as backend:
        whole = run_with(backend, tmp_path / "whole")
        run_with(backend, tmp_path / "resumed")
        resumed = run_with(backend, tmp_path / "resumed", start=4)
    assert resumed == whole


def test_a_run_that_begins_again_does_not_keep_the_first_line_of_another(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text('{"step": 0, "epoch": 0, "state": {"model.other": "0"}}\n')
    with connect("single") as backend:
        run_with(backend, tmp_path / "ledger")
    assert set(read_ledger(tmp_path / "ledger")[0]["state"]) == {"model.weight", "optimizer.weight.momentum"}


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_ranks_with_different_weights_all_stop_and_name_the_difference(
    ranks: Ranks, tmp_path: Path, broken: int
) -> None:
    for message in ranks(3, broken_run, tmp_path / "ledger", broken):
        assert message.startswith("the ranks hold different weights or optimizer states after step 6: ")
        assert f"rank {max(broken, 1)} has another model.weight, optimizer.weight.momentum than rank 0" in message


def broken_run(backend: Backend, path: Path, broken: int) -> Any:
    return run_with(backend, path, broken_rank=broken)
