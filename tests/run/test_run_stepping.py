"""A config has one update or several, and the run sees one object of each kind either way."""

from pathlib import Path

import pytest
from small_run import small_run
from test_run_several_updates import FIELDS
from torch.optim import SGD, Optimizer

from disttrain.engine import Engine
from disttrain.parallel.optimizers import Optimizers
from disttrain.run.updates import Updates
from disttrain.run.updates_together import UpdatesTogether


@pytest.mark.parametrize("several", [False, True])
def test_the_parts_of_a_step(tmp_path: Path, several: bool) -> None:
    run = small_run(tmp_path, **(FIELDS if several else {}))
    assert isinstance(run.trainer, Engine)
    assert type(run.updates) is (UpdatesTogether if several else Updates)
    if several:
        assert isinstance(run.optimizer, Optimizers)
        assert list(run.optimizers) == ["b", "a"]
        assert all(isinstance(each, Optimizer) for each in run.optimizers.values())
    else:
        assert isinstance(run.optimizer, SGD)
        assert run.optimizers == {"optimizer": run.optimizer}
    run.close()
