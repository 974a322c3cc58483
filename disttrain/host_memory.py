"""The memory of this host and of this process, as the system counts it, and the processes that it killed for memory.

*Contract*: numbers of bytes; None where the system does not tell, as outside Linux. The host's memory is that of the
control group of this process (a container, a batch job), if that is less. Nothing here is changed.

*Source*: proc(5), "/proc/meminfo", "/proc/pid/status" and "/proc/vmstat"; cgroups(7), "memory.max".
"""

import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def host_bytes() -> int | None:
    """Return the memory that the processes of this host, or of this container, may have together, swap included."""
    total, swap = _field(PROC / "meminfo", "MemTotal"), _field(PROC / "meminfo", "SwapTotal")
    if total is None:
        return None
    return min([total + (swap or 0), *_limits()])


def resident_bytes() -> int | None:
    """Return the memory that this process occupies now."""
    return _field(PROC / "self/status", "VmRSS")


def num_killed_for_memory() -> int | None:
    """Return the processes that the kernel of this host has killed for want of memory since it started."""
    try:
        text = (PROC / "vmstat").read_text()
    except OSError:
        return None
    match = re.search(r"(?m)^oom_kill (\d+)$", text)
    return None if match is None else int(match[1])


def _limits() -> Iterator[int]:
    """Yield the limits of the control groups that hold this process, from its own to the outermost."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            try:
                text = (group / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():
                yield int(text)


def _field(path: Path, name: str) -> int | None:
    """Return the bytes of a line such as `VmRSS:  1024 kB`; None without it."""
    try:
        text = path.read_text()
    except OSError:
        return None
    match = re.search(rf"(?m)^{name}:\s+(\d+) kB$", text)
    return None if match is None else int(match[1]) * 1024
