"""Power losses while checkpoints are saved constantly: `python tests/soak/power.py [--losses 40]`; needs root.

An ext4 image is mounted by a loop device. A child saves into it without end and reports each save that has returned
through a pipe. At a random moment the program shuts the file system down by EXT4_IOC_SHUTDOWN without flushing its
journal. The image then holds what a disk would hold after a power loss. The program kills the child and mounts the
image again. The newest checkpoint must be good, and not older than the last one reported. If the machine does not allow
this, the program prints the reason and ends with 0.
"""

import argparse
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

from checkpoint_children import fork
from checkpoint_states import mark_of, marked

from disttrain.checkpoint import AsynchronousSaver, clean, load_newest, rotate, save, survey

EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_FLUSHING_THE_JOURNAL = 2
IMAGE_BYTES = 400 * 2**20
SIZE = 2**18
"""The number of elements in each of the state's three tensors: a checkpoint has 3 MB."""
LONGEST_LIFE_S = 0.7


def synchronous(root: Path, report: Callable[[int], None], step: int) -> None:
    while True:
        step += 1
        save(root, step, marked(step, SIZE), keep=2)
        report(step)


def asynchronous(root: Path, report: Callable[[int], None], step: int) -> None:
    with AsynchronousSaver(root) as saver:
        while True:
            step += 1
            saver(marked(step, SIZE), f"step-{step:08d}", {})
            saver.remove(f"step-{step - 2:08d}")
            report(step - 1)  # the call has waited for this save


@dataclass
class Report:
    """The counts of a series of power losses."""

    losses: int = 0
    torn: int = 0
    lost: int = 0
    damaged: int = 0
    seconds: float = 0.0


class Disk:
    """An ext4 file system that can lose its power; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._image, self.mounted = folder / "image", folder / "mounted"

    def __enter__(self) -> "Disk":
        self.mounted.mkdir()
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        run("mkfs.ext4", "-q", "-F", self._image)
        self.mount()
        return self

    def mount(self) -> None:
        run("mount", "-o", "loop", self._image, self.mounted)

    def lose_power(self) -> None:
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_JOURNAL))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        for _ in range(50):
            if subprocess.run(["umount", self.mounted], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.05)
        run("umount", "-l", self.mounted)

    def __exit__(self, *error: object) -> None:
        self.unmount()


def run(*command: Any) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def obstacle() -> str | None:
    """Return the reason why this machine cannot simulate a power loss; None if it can."""
    if os.geteuid() != 0:
        return "it needs root, to mount a file system and shut it down"
    if missing := [name for name in ("mkfs.ext4", "mount", "umount") if shutil.which(name) is None]:
        return f"it needs {', '.join(missing)}"
    folder = Path(tempfile.mkdtemp(prefix="disttrain-power-"))
    try:
        with Disk(folder) as disk:
            disk.lose_power()
    except (OSError, subprocess.CalledProcessError) as error:
        stderr = getattr(error, "stderr", b"") or b""
        return f"a loop-mounted ext4 cannot be shut down here: {stderr.decode(errors='replace').strip() or error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def lose(num_losses: int, saving: Callable[..., None], seed: int = 0) -> Report:
    """Lose the power `num_losses` times; return the counts of what the disk held afterwards."""
    report, draws, began = Report(), random.Random(seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="disttrain-power-"))
    try:
        with Disk(folder) as disk:
            root = disk.mounted / "checkpoints"
            root.mkdir()
            os.sync()
            newest = 0
            for _ in range(num_losses):
                newest = one_loss(disk, root, saving, newest, draws, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.seconds = time.monotonic() - began
    return report


def one_loss(
    disk: Disk, root: Path, saving: Callable[..., None], newest: int, draws: random.Random, report: Report
) -> int:
    """Save for a while, lose the power, and return the newest step that can be loaded afterwards."""
    reader, writer = os.pipe()
    clean(root)

    def body() -> None:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the errors about a disk that is gone
        saving(root, lambda step: os.write(writer, f"{step}\n".encode()), newest)

    pid = fork(body)
    os.close(writer)
    with os.fdopen(reader) as lines:
        reported = [newest, int(lines.readline() or newest)]  # waits until this life has saved something
        time.sleep(draws.uniform(0, LONGEST_LIFE_S))
        disk.lose_power()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reported += map(int, lines)
    disk.unmount()
    disk.mount()
    report.losses += 1
    entries = survey(root)
    report.torn += sum(entry.state == "tmp" for entry in entries)
    report.damaged += sum(entry.state == "damaged" for entry in entries)
    loaded = load_newest(root)
    step = 0 if loaded is None else mark_of(loaded.state)
    report.lost += step < reported[-1]
    rotate(root, 2)
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (reason := obstacle()) is not None:
        print(f"power losses: not run: {reason}")
        return 0
    print("| saves | power losses | torn saves left | lost | damaged | time |")
    print("|---|---|---|---|---|---|")
    good = True
    for saving in (synchronous, asynchronous):
        report = lose(options.losses, saving, options.seed)
        good = good and not report.lost and not report.damaged
        print(
            f"| {saving.__name__} | {report.losses} | {report.torn} | {report.lost} | {report.damaged} "
            f"| {report.seconds:.0f} s |"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
