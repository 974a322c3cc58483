"""One save in the background: removals after it, notes between ranks, and a part of which no note comes."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import mark_of, marked

from disttrain.checkpoint import CheckpointInfo, load
from disttrain.checkpoint.jobs import Job, write_and_commit, write_and_note
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.state_tree import Flat, flatten
from disttrain.errors import CheckpointError


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def nothing() -> None:
    """Copy no tensors."""


def test_removals_wait_for_the_save_and_follow_it_in_order() -> None:
    go_on, removed = threading.Event(), list[str]()

    def work(job: Job) -> None:
        job.copy(nothing)
        assert go_on.wait(30)

    job = Job(work, removed.append)
    job.remove_after("first")
    job.remove_after("second")
    assert job.copied.wait(30)
    assert (job.is_writing, job.ended(), removed) == (True, False, [])
    go_on.set()
    assert job.ended(30)
    assert not job.is_writing
    assert removed == ["first", "second"]
    job.remove_after("third")  # at once
    assert removed == ["first", "second", "third"]
    assert job.took_s is not None
    assert job.failure is None


@pytest.mark.parametrize("work", [fail, lambda job: job.copy(fail)])
def test_a_failed_save_keeps_the_old_and_frees_the_state(work: Callable[[Job], None]) -> None:
    removed = list[str]()
    job = Job(work, removed.append)
    assert job.ended(30)
    job.remove_after("old")
    assert removed == []
    assert isinstance(job.failure, OSError)
    assert job.copied.is_set()
    assert not job.is_writing
    assert job.took_s is None


def shares_of_two(step: int) -> tuple[Share, Share]:
    """Return the shares of two ranks of the state `marked(step)`."""
    flat = flatten(marked(step))
    table = {name: 1 + index % 2 for index, name in enumerate(flat.tensors)}
    parts = [{name: flat.tensors[name] for name in table if table[name] == number} for number in (1, 2)]
    return Share(Flat(flat.tree, parts[0]), 2, table), Share(Flat(flat.tree, parts[1]), 2, table)


@pytest.mark.parametrize("first", [0, 1])
def test_the_parts_of_two_ranks_are_committed_in_any_order(tmp_path: Path, first: int) -> None:
    store, shares = LocalStore(tmp_path), shares_of_two(6)
    upload = store.begin(6)

    def commit(job: Job) -> None:
        write_and_commit(store, upload, 6, shares[0], CheckpointInfo(), 2, nothing, job)

    def note(job: Job) -> None:
        write_and_note(store, upload, shares[1], 1, nothing, job)

    jobs = [Job(work, fail) for work in ((commit, note) if first == 0 else (note, commit))]
    assert [job.ended(60) for job in jobs] == [True, True]
    assert [job.failure for job in jobs] == [None, None]
    loaded = load(tmp_path / "step-00000006")
    assert mark_of(loaded.state) == 6
    assert loaded.manifest.world_size == len(loaded.manifest.files) == 2


def test_a_failed_part_ends_the_save_with_its_reason_and_leaves_nothing(tmp_path: Path) -> None:
    store, shares = LocalStore(tmp_path), shares_of_two(6)
    upload = store.begin(6)
    part = Job(lambda job: write_and_note(store, upload, shares[1], 1, fail, job), fail)
    assert part.ended(60)
    assert isinstance(part.failure, OSError)
    job = Job(lambda job: write_and_commit(store, upload, 6, shares[0], CheckpointInfo(), 2, nothing, job), fail)
    assert job.ended(60)
    assert isinstance(job.failure, CheckpointError)
    assert "No space left on device" in str(job.failure)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("note", [None, "", '{"record": {"size_by'])
def test_a_part_without_a_note_is_an_error_after_a_while(tmp_path: Path, note: str | None) -> None:
    store = LocalStore(tmp_path)
    state = flatten(marked(1))
    share = Share(state, 2, dict.fromkeys(state.tensors, 1))
    upload = store.begin(1)
    if note is not None:
        store.leave_note(upload, 1, note)  # cut off, or still being written

    def work(job: Job) -> None:
        job.patience_s = 0.0
        write_and_commit(store, upload, 1, share, CheckpointInfo(), 2, nothing, job)

    job = Job(work, fail)
    assert job.ended(60)
    assert "expected a note from each of the ranks [1]" in str(job.failure)
    assert os.listdir(tmp_path) == []


def test_a_failure_elsewhere_ends_the_wait_for_its_note(tmp_path: Path) -> None:
    store, shares = LocalStore(tmp_path), shares_of_two(6)
    upload = store.begin(6)

    def work(job: Job) -> None:
        job.failure_elsewhere = "rank 1 could leave no note"
        write_and_commit(store, upload, 6, shares[0], CheckpointInfo(), 2, nothing, job)

    job = Job(work, fail)
    assert job.ended(60)
    assert str(job.failure) == "rank 1 could leave no note"
