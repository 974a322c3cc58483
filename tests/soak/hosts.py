"""Hosts on one machine: network, process, mount and UTS namespaces, joined by a bridge; needs root (Linux).

    with Network(3) as network:                    # the bridge has the address 10.77.0.1
        network.hosts[0].boot(script, log)         # its process 1 is a shell that runs the script
        network.hosts[0].cut()                     # its link is down: packets are lost without any notice
        network.hosts[0].mend()
        network.hosts[0].crash()                   # all its processes end at once

Nothing stays behind: the end of the context removes everything. If the program is killed, its processes end with it,
and the next program removes its namespaces.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PREFIX = "dtchaos"
SWITCH = "10.77.0.1"
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def run(*command: Any) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout


def obstacle() -> str | None:
    """Return the reason why this machine cannot make hosts; None if it can."""
    if os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    if missing := [name for name in ("ip", "nsenter", "unshare", "mount", "hostname") if shutil.which(name) is None]:
        return f"it needs {', '.join(missing)}"
    try:
        with Network(1) as network, tempfile.TemporaryDirectory() as folder:
            if network.hosts[0].boot("exit 7", Path(folder, "log")).wait(30) != 7:
                return f"a host cannot be started here: {Path(folder, 'log').read_text().strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"hosts cannot be made here: {getattr(error, 'stderr', None) or error}"
    return None


def started(command: list[str], log: Path, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own; it prints into `log` and ends with this process."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )


class Host:
    """One host, with an address of its own and a link to the switch."""

    def __init__(self, number: int, network: "Network") -> None:
        self.name, self.address = f"n{number}", f"10.77.0.{10 + number}"
        self.space, self._link, self._network = f"{network.prefix}-{self.name}", f"v{number}", network
        self.process: subprocess.Popen[bytes] | None = None
        run("ip", "netns", "add", self.space)
        run("ip", "-n", self.space, "link", "set", "lo", "up")
        kind = ["type", "veth", "peer", "name", "eth0", "netns", self.space]
        run("ip", "-n", network.switch, "link", "add", self._link, *kind)
        run("ip", "-n", network.switch, "link", "set", self._link, "master", "br0", "up")
        run("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run("ip", "-n", self.space, "link", "set", "eth0", "up")

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def boot(self, script: str, log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the host: its process 1 is a shell with `script`. It prints into `log`, and ends with this process."""
        first = f"mount --bind {self._network.names} /etc/hosts && hostname {self.name}\n"
        command = ["nsenter", f"--net=/run/netns/{self.space}", "unshare", "--uts", "--mount", "--pid", "--fork"]
        command += ["--kill-child", "--mount-proc", "bash", "-c", first + script]
        self.process = started(command, log, environment)
        return self.process

    def crash(self) -> None:
        """End all its processes at once; their connections are reset, because the kernel still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        kill_all(self.space)

    def cut(self) -> None:
        run("ip", "-n", self._network.switch, "link", "set", self._link, "down")

    def mend(self) -> None:
        run("ip", "-n", self._network.switch, "link", "set", self._link, "up")

    def processes(self) -> list[tuple[int, str, str]]:
        """Return its processes: the id outside the host, the name and the command line."""
        processes = [(pid, proc_file(pid, "comm"), proc_file(pid, "cmdline")) for pid in pids_of(self.space)]
        return [process for process in processes if process[2]]


class Network:
    """A bridge with hosts; a context manager."""

    def __init__(self, num_hosts: int) -> None:
        self.prefix = f"{PREFIX}{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self._num_hosts = num_hosts
        self.hosts: list[Host] = []

    def __enter__(self) -> "Network":
        clear_leftovers()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.names = self._folder / "hosts"
        try:
            run("ip", "netns", "add", self.switch)
            for link in (["lo"], ["add", "br0", "type", "bridge"], ["br0"]):
                arguments = [*link] if link[0] == "add" else ["set", *link, "up"]
                run("ip", "-n", self.switch, "link", *arguments)
            run("ip", "-n", self.switch, "addr", "add", f"{SWITCH}/24", "dev", "br0")
            self.hosts = [Host(number, self) for number in range(self._num_hosts)]
        except BaseException:
            self.__exit__()
            raise
        lines = ["127.0.0.1 localhost", f"{SWITCH} switch", *(f"{host.address} {host.name}" for host in self.hosts)]
        self.names.write_text("\n".join(lines) + "\n")
        return self

    def at_switch(self, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a process beside the hosts, on a machine without faults; it ends with the network."""
        return started(["ip", "netns", "exec", self.switch, *command], log, environment)

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.crash()
        remove(self.prefix)
        shutil.rmtree(self._folder, ignore_errors=True)


def spaces() -> list[str]:
    return [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.strip()]


def pids_of(space: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def proc_file(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ").strip()
    except OSError:  # the process has ended meanwhile
        return ""


def kill(pid: int) -> bool:
    """Kill one process by SIGKILL; return whether it existed."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_all(space: str) -> None:
    while pids := [pid for pid in pids_of(space) if not zombie(pid)]:
        for pid in pids:
            kill(pid)


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def remove(prefix: str) -> None:
    for space in spaces():
        if space.startswith(f"{prefix}-"):
            kill_all(space)
            run("ip", "netns", "del", space)


def clear_leftovers() -> None:
    """Remove the namespaces of killed programs of this kind."""
    for space in spaces():
        owner = re.fullmatch(rf"({PREFIX}(\d+))-.*", space)
        if owner is not None and int(owner[2]) != os.getpid() and not Path(f"/proc/{owner[2]}").exists():
            remove(owner[1])
