"""A checkpoint that a stranger wrote is loaded or refused, whatever is in it, and nothing else happens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import mark_of
from checkpoint_strangers import ATTACKS, ATTACKS_ON_TWO, attack, rewrite, victim, victim_in_two, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import DamagedError, load

ATTACKED: list[Path] = []
IN_TWO: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def attacked(tmp_path_factory: pytest.TempPathFactory) -> None:
    ATTACKED.append(victim(tmp_path_factory.mktemp("victim")))
    IN_TWO.append(victim_in_two(tmp_path_factory.mktemp("victim")))


@pytest.mark.parametrize("how", ATTACKS, ids=lambda how: how.__name__)
def test_any_change_is_loaded_or_refused(how: Callable[..., None]) -> None:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def once(data: st.DataObject) -> None:
        attack(ATTACKED[-1], how, data.draw)

    once()
    assert load(ATTACKED[-1]).manifest.step == 1


@pytest.mark.parametrize("how", ATTACKS_ON_TWO, ids=lambda how: how.__name__)
def test_any_change_to_one_in_several_files_is_loaded_or_refused(how: Callable[..., None]) -> None:
    @given(data=st.data())
    @settings(max_examples=80, deadline=None)
    def once(data: st.DataObject) -> None:
        attack(IN_TWO[-1], how, data.draw)

    once()
    assert mark_of(load(IN_TWO[-1]).state) == 1


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ({"dim": 0, "chunks": [[1, 0, 3], [2, 2, 1]]}, "overlap or leave a gap at 3"),
        ({"dim": 0, "chunks": [[1, 0, 2], [2, 3, 1]]}, "overlap or leave a gap at 2"),
        ({"dim": 0, "chunks": [[1, 0, 3]]}, "end at 3 of dimension 0, expected 4"),
        ({"dim": 0, "chunks": []}, "end at 0 of dimension 0, expected 4"),
        ({"dim": 0, "chunks": [[1, 0, 3], [2, 3, 2**62]]}, "expected 4"),
        ({"dim": 0, "chunks": [[1, 0, 3], [1, 3, 1]]}, "has two chunks in one file"),
        ({"dim": 0, "chunks": [[1, 0, 3], [2, 3, 1], [2, 3, 1]]}, "has two chunks in one file"),
        ({"dim": 0, "chunks": [[1, 0, 3], [3, 3, 1]]}, "not among the 2"),
        ({"dim": 0, "chunks": [[1, 0, 3], [0, 3, 1]]}, "not among the 2"),
        ({"dim": 0, "chunks": [[1, 0, 3], [2, -1, 1]]}, "overlap or leave a gap"),
        ({"dim": 0, "chunks": [[1, 0, 1], [2, 1, 3]]}, r"should be float32 of shape \[1\], got F32 of shape \[3\]"),
        ({"dim": 1, "chunks": [[1, 0, 3], [2, 3, 1]]}, "cut along dimension 1, but has 1"),
        ({"dim": -1, "chunks": [[1, 0, 3], [2, 3, 1]]}, "is not a manifest"),
        ({"dim": 0, "chunks": [[1, 0], [2, 3, 1]]}, "is not a manifest"),
        (1, r"should be float32 of shape \[4\]"),
        (3, "not among the 2"),
        ("tensors.safetensors", "is not a manifest"),
        (None, "is not a manifest"),
    ],
)
def test_chunks_that_do_not_tile_their_tensor_are_refused(tmp_path: Path, cut: Any, reason: str) -> None:
    path = victim_in_two(tmp_path)
    table = json.loads((path / "MANIFEST.json").read_text())["tensors"]
    rewrite(path, tensors=table | {"model.0.weight": cut})
    with pytest.raises(DamagedError, match=reason):
        load(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "tensors.safetensors", "tensors-00003-of-00003.safetensors"])
def test_a_file_that_is_not_of_the_save_is_refused(tmp_path: Path, name: str) -> None:
    path = victim_in_two(tmp_path)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    record = manifest["files"].pop("tensors-00002-of-00002.safetensors")
    manifest["files"][name] = record
    write_manifest(path, json.dumps(manifest).encode())
    with pytest.raises(DamagedError, match=r"MANIFEST\.json"):
        load(path)


def test_a_tensor_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    path = victim_in_two(tmp_path)
    table = json.loads((path / "MANIFEST.json").read_text())["tensors"]
    rewrite(path, tensors={name: entry for name, entry in table.items() if name != "count"})
    with pytest.raises(DamagedError, match="lists no file for the tensor 'count'"):
        load(path)


@pytest.mark.parametrize("sizes", [[2**63], [2**200, 1]])
def test_a_size_that_no_tensor_has_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    path = victim(tmp_path)
    rewrite(path, state={"$size": sizes})
    with pytest.raises(DamagedError, match="a size beyond what a tensor can have"):
        load(path)


def test_an_unchanged_checkpoint_is_loaded(tmp_path: Path) -> None:
    def not_at_all(directory: Path, draw: Any) -> None:
        assert load(directory).state["pair"] == (1, 2**80)

    attack(victim(tmp_path), not_at_all, None)
