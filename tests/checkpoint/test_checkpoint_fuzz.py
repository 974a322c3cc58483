"""Whatever a stranger writes into a checkpoint, loading it works or is refused, and nothing else happens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_strangers import ATTACKS, attack, rewrite, victim
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import DamagedError, load

ATTACKED: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def attacked(tmp_path_factory: pytest.TempPathFactory) -> None:
    ATTACKED.append(victim(tmp_path_factory.mktemp("victim")))


@pytest.mark.parametrize("how", ATTACKS, ids=lambda how: how.__name__)
def test_any_change_is_loaded_or_refused(how: Callable[..., None]) -> None:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def once(data: st.DataObject) -> None:
        attack(ATTACKED[-1], how, data.draw)

    once()
    assert load(ATTACKED[-1]).manifest.step == 1


@pytest.mark.parametrize("sizes", [[2**63], [2**200, 1]])
def test_a_size_that_no_tensor_has_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    path = victim(tmp_path)
    rewrite(path, state={"$size": sizes})
    with pytest.raises(DamagedError, match="a size beyond what a tensor can have"):
        load(path)


def test_what_is_not_changed_is_loaded(tmp_path: Path) -> None:
    def not_at_all(directory: Path, draw: Any) -> None:
        assert load(directory).state["pair"] == (1, 2**80)

    attack(victim(tmp_path), not_at_all, None)
