"""The zoo has every optimizer and every schedule of torch, and its lists name variants that exist."""

import torch
from test_zoo_parts import MODULES as PARTS
from test_zoo_runs import MODULES as RUNS
from test_zoo_updates import MODULES as UPDATES
from torch.optim import Optimizer, lr_scheduler
from zoo_catalogue import AWAITED, MODULES, REFUSED, REFUSED_SHARDED, SHORT, variants
from zoo_optimizers import TORCHS as OPTIMIZERS
from zoo_schedules import TORCHS as SCHEDULES

LEAST_VARIANTS = 150


def test_every_optimizer_of_torch_has_a_variant() -> None:
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert {name for name, kind in kinds.items() if issubclass(kind, Optimizer)} - {"Optimizer"} == {*OPTIMIZERS}


def test_every_schedule_of_torch_has_a_variant() -> None:
    kinds = {name: kind for name, kind in vars(lr_scheduler).items() if isinstance(kind, type)}
    schedules = {name for name, kind in kinds.items() if issubclass(kind, lr_scheduler.LRScheduler)}
    assert {name for name in schedules if not name.startswith("_")} == {*SCHEDULES}


def test_the_lists_name_variants_and_no_variant_is_in_two() -> None:
    assert sorted((*PARTS, *RUNS, *UPDATES)) == sorted(MODULES)
    names = variants()
    assert len(names) == len(set(names)) >= LEAST_VARIANTS
    lists = [REFUSED, REFUSED_SHARDED, AWAITED]
    listed = [name for each in lists for name in each]
    assert {*listed, *SHORT} <= {*names}
    assert len(listed) == len(set(listed))
