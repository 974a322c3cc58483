"""The memory of this host and process: the system's own numbers, and files such as the system's."""

import os
import subprocess
from pathlib import Path

import pytest

from disttrain import host_memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:  5 kB\nSwapTotal:  24 kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with files of a system, that of the real one's kind; `proc` and `cgroup` in it."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "cgroup/job/rank").mkdir(parents=True)
    return tmp_path


def test_this_process_and_this_host_have_numbers() -> None:
    resident, host = host_memory.resident_bytes(), host_memory.host_bytes()
    assert resident is not None
    assert host is not None
    assert 10 * 2**20 < resident < host
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=False)
    if told.returncode == 0:
        assert int(told.stdout) * 1024 == pytest.approx(resident, rel=0.1)


def test_the_least_limit_of_a_control_group_counts(system: Path) -> None:
    (system / "proc/meminfo").write_text(MEMINFO)
    assert host_memory.host_bytes() == 1024 * 1024
    (system / "proc/self/cgroup").write_text("0::/job/rank\n")
    for limit, group, expected in (
        ("max", "job/rank", 1024 * 1024),
        ("900000", "job", 900000),
        ("800000", "job/rank", 800000),
        ("99999999", "job/rank", 900000),
    ):
        (system / "cgroup" / group / "memory.max").write_text(f"{limit}\n")
        assert host_memory.host_bytes() == expected


def test_the_older_control_groups(system: Path) -> None:
    (system / "proc/meminfo").write_text(MEMINFO)
    (system / "proc/self/cgroup").write_text("7:cpu:/job\n5:memory:/job\n")
    (system / "cgroup/memory/job").mkdir(parents=True)
    (system / "cgroup/memory/job/memory.limit_in_bytes").write_text("500000\n")
    assert host_memory.host_bytes() == 500000


def test_kills_for_want_of_memory_are_counted(system: Path) -> None:
    assert host_memory.num_killed_for_memory() is None
    (system / "proc/vmstat").write_text("nr_free_pages 3\noom_kill 12\n")
    assert host_memory.num_killed_for_memory() == 12


def test_a_system_that_does_not_tell(system: Path) -> None:
    assert host_memory.host_bytes() is None
    assert host_memory.resident_bytes() is None
