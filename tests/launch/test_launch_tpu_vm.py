"""launch/tpu_vm without a TPU: a double of `gcloud` records its arguments, or runs commands in folders, not in VMs."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "tpu_vm"
NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh"))

# It writes its arguments to $ASKED as one line of JSON. `describe` prints two addresses. `scp` keeps the archive.
# `ssh` runs the command in the home of each worker, all at once, if there are such homes.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
words = sys.argv[1:]
with open(os.environ["ASKED"], "a") as asked:
    print(json.dumps(words), file=asked)
act = words[3]
homes = sorted(pathlib.Path(os.environ["HOMES"]).glob("worker-*"))
if act == "describe":
    print(os.environ.get("ADDRESSES", "10.0.0.2;10.0.0.3"))
if act == "scp":
    with open(words[4], "rb") as archive:
        pathlib.Path(os.environ["ASKED"] + ".tgz").write_bytes(archive.read())
if act == "ssh" and homes:
    command = words[words.index("--command") + 1]
    started = [
        subprocess.Popen(["bash", "-c", command], cwd=home, env={**os.environ, "WORKER": str(i)})
        for i, home in enumerate(homes)
    ]
    sys.exit(max(process.wait() for process in started))
"""


class Cloud:
    """A folder with the programs that the scripts call; it is first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked_file = folder / "asked"
        (folder / "bin").mkdir()
        (folder / "homes").mkdir()
        self.program("gcloud", f"#!{sys.executable}\n{GCLOUD}")

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "CHIPS", "PJRT_DEVICE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        env |= {"PATH": f"{self.folder / 'bin'}:{env['PATH']}", "ASKED": str(self.asked_file)}
        env |= {"HOMES": str(self.folder / "homes"), **variables}
        return subprocess.run(
            [SCRIPTS / script, *words], env=env, capture_output=True, text=True, timeout=150, check=False
        )

    def asked(self) -> list[list[str]]:
        lines = self.asked_file.read_text().splitlines() if self.asked_file.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


TPU_VM = ["compute", "tpus", "tpu-vm"]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_sound(name: str) -> None:
    path = SCRIPTS / name
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("on_worker")])
def test_without_arguments_it_prints_its_usage_and_calls_nothing(cloud: Cloud, name: str) -> None:
    done = cloud.run(name)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert cloud.asked() == []


def test_create(cloud: Cloud) -> None:
    assert cloud.run("create.sh", "t1", "z", "v5litepod-8", "v2-alpha-tpuv5-lite", "--spot").returncode == 0
    wanted = ["--zone", "z", "--accelerator-type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite", "--spot"]
    assert cloud.asked() == [[*TPU_VM, "create", "t1", *wanted]]


def test_setup_copies_the_checkout_and_installs_it_on_every_worker(cloud: Cloud) -> None:
    done = cloud.run("setup.sh", "t1", "z")
    assert done.returncode == 0, done.stderr
    scp, ssh = cloud.asked()
    assert scp[:4] == [*TPU_VM, "scp"]
    assert scp[5:] == ["t1:disttrain.tgz", "--zone", "z", "--worker=all"]
    assert not Path(scp[4]).exists()  # the archive is removed on this machine
    assert ssh[:-1] == [*TPU_VM, "ssh", "t1", "--zone", "z", "--worker=all", "--command"]
    with tarfile.open(f"{cloud.asked_file}.tgz") as archive:
        names = set(archive.getnames())
    assert {"./disttrain/launch.py", "./constraints-xla.txt", "./launch/tpu_vm/on_worker_setup.sh"} <= names
    assert not [name for name in names if "/." in name[1:] or name.startswith("./runs") or "__pycache__" in name]


def test_run_gives_every_worker_all_addresses_and_the_words_unchanged(cloud: Cloud) -> None:
    words = ["cfg.py", "name=it's $HOME; a|b", "max_steps=3"]
    assert cloud.run("run.sh", "t1", "z", *words).returncode == 0
    describe, ssh = cloud.asked()
    assert describe[:5] == [*TPU_VM, "describe", "t1"]
    assert ssh[:-1] == [*TPU_VM, "ssh", "t1", "--zone", "z", "--worker=all", "--command"]
    assert shlex.split(ssh[-1]) == ["bash", "disttrain/launch/tpu_vm/on_worker_run.sh", "10.0.0.2,10.0.0.3", *words]


def test_run_without_an_address_stops(cloud: Cloud) -> None:
    done = cloud.run("run.sh", "t1", "z", "cfg.py", ADDRESSES="")
    assert done.returncode == 1
    assert "t1 in z has no address" in done.stderr
    assert len(cloud.asked()) == 1


@pytest.mark.parametrize(("script", "act"), [("delete.sh", "delete"), ("stop.sh", "ssh")])
def test_stop_and_delete(cloud: Cloud, script: str, act: str) -> None:
    assert cloud.run(script, "t1", "z").returncode == 0
    stop = ["--worker=all", "--command", 'kill -TERM "$(cat disttrain/torchrun.pid)"']
    assert cloud.asked() == [[*TPU_VM, act, "t1", "--zone", "z", *(stop if act == "ssh" else [])]]


def workers(cloud: Cloud, addresses: list[str]) -> list[Path]:
    """Make a home with the checkout for each worker, and a `hostname` that prints the worker's own address."""
    homes = []
    for i in range(len(addresses)):
        home = cloud.folder / "homes" / f"worker-{i}"
        checkout = home / "disttrain"
        (checkout / ".venv" / "bin").mkdir(parents=True)
        for name in ("disttrain", "examples"):
            (checkout / name).symlink_to(ROOT / name)
        # A copy, because a script finds its checkout by its own path.
        shutil.copytree(SCRIPTS, checkout / "launch" / "tpu_vm")
        homes.append(checkout)
    cloud.program("hostname", f"#!/bin/bash\na=({' '.join(addresses)})\necho 172.17.0.1 ${{a[WORKER]}}\n")
    return homes


def test_each_worker_starts_torchrun_with_its_own_rank(cloud: Cloud) -> None:
    addresses = ["10.0.0.2", "10.0.0.3"]
    for checkout in workers(cloud, addresses):
        torchrun = checkout / ".venv/bin/torchrun"
        torchrun.write_text('#!/bin/bash\necho "$PJRT_DEVICE" "$@" > started\n')
        torchrun.chmod(0o755)
    done = cloud.run("run.sh", "t1", "z", "cfg.py", "name=a b", CHIPS="4")
    assert done.returncode == 0, done.stderr
    for i in range(2):
        home = cloud.folder / "homes" / f"worker-{i}" / "disttrain"
        assert (home / "started").read_text().split(" ", 1) == [
            "TPU",
            f"--nnodes 2 --node-rank {i} --nproc-per-node 4 --master-addr 10.0.0.2 --master-port 29500 "
            "-m disttrain.launch cfg.py name=a b\n",
        ]
        assert (home / "torchrun.pid").read_text().strip().isdigit()


@pytest.mark.parametrize(
    ("addresses", "chips", "expected"),
    [
        ("10.0.0.9", "4", r"expected one of this worker's addresses (172.17.0.1 10.0.0.2) among those of the slice"),
        ("10.0.0.2", "0", "expected TPU chips"),
    ],
)
def test_a_worker_that_cannot_start_gives_the_reason(cloud: Cloud, addresses: str, chips: str, expected: str) -> None:
    workers(cloud, ["10.0.0.2"])
    done = cloud.run("run.sh", "t1", "z", "cfg.py", ADDRESSES=addresses, CHIPS=chips)
    assert done.returncode == 1
    assert expected in done.stderr


@pytest.mark.slow
def test_two_workers_of_this_machine_train_together(cloud: Cloud, tmp_path: Path) -> None:
    """Run all but Google's part: two folders as workers, two loopback addresses, and gloo in place of the TPU."""
    addresses = ["127.0.0.1", "127.0.0.2"]
    for checkout in workers(cloud, addresses):
        (checkout / ".venv/bin/torchrun").symlink_to(Path(sys.executable).with_name("torchrun"))
    words = ["examples/digits.py", "max_epochs=1", "backend=gloo", "--runs", str(tmp_path / "shared")]
    done = cloud.run("run.sh", "t1", "z", *words, ADDRESSES=";".join(addresses), CHIPS="2", MASTER_PORT="29731")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "shared/digits/result.json").read_text())
    assert (result["status"], result["world_size"]) == ("completed", 4)
