"""launch/skypilot without a cloud: the job by SkyPilot's own parser and schema, and its `run` script here."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))  # commands.py

from commands import environment, launch, result, write_cfg  # noqa: E402

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'disttrain[test]'")

JOB = ROOT / "launch" / "skypilot" / "job.yaml"

# In a process of its own: SkyPilot makes a folder of its own in HOME when it is imported.
PARSE = """
import json, sys, yaml
import sky
from sky.utils import schemas, validator
job = yaml.safe_load(open(sys.argv[1]))
validator.get_schema_validator()(schemas.get_task_schema()).validate(job)
task = sky.Task.from_yaml(sys.argv[1])
[resources] = task.resources
print("parsed", json.dumps({"recovery": resources.job_recovery, "nodes": task.num_nodes, "spot": resources.use_spot}))
"""


def parse(path: Path, home: Path) -> "subprocess.CompletedProcess[str]":
    variables = {**environment(), "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [sys.executable, "-c", PARSE, str(path)]
    return subprocess.run(command, env=variables, cwd=home, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_skypilot_reads_the_job_as_it_is_meant(tmp_path: Path) -> None:
    pytest.importorskip("sky", reason="SkyPilot is not installed: pip install 'disttrain[launchers]'")
    done = parse(JOB, tmp_path)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("parsed ")]
    read = json.loads(line.removeprefix("parsed "))
    assert read["recovery"]["recover_on_exit_codes"] == [75]
    assert read["recovery"]["max_restarts_on_errors"] == 3
    assert (read["nodes"], read["spot"]) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [("recover_on_exit_codes: [75]", "recover_on_exit_codes: [750]"), ("num_nodes: 2", "num_node: 2")],
)
def test_skypilot_finds_a_planted_mistake(tmp_path: Path, old: str, new: str) -> None:
    pytest.importorskip("sky", reason="SkyPilot is not installed: pip install 'disttrain[launchers]'")
    (tmp_path / "job.yaml").write_text(JOB.read_text().replace(old, new))
    done = parse(tmp_path / "job.yaml", tmp_path)
    assert done.returncode != 0
    assert new.split(": ")[0 if "node" in new else 1].strip("[]") in done.stderr


def machines(folder: Path, number: int, *words: str) -> list["subprocess.Popen[bytes]"]:
    """Start the job's `run` script as SkyPilot does, on so many machines, which are all this one."""
    job = yaml.safe_load(JOB.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (folder / "disttrain").write_text(f'#!/bin/sh\nexec {sys.executable} -m disttrain "$@"\n')
    (folder / "disttrain").chmod(0o755)
    started = []
    for rank in range(number):
        home = folder / f"machine-{rank}"  # no machine sees the files of another, but for the bucket
        home.mkdir()
        variables = {
            **environment(),
            **{name: str(value) for name, value in job["envs"].items()},
            "WORDS": " ".join([job["envs"]["WORDS"], *words]),
            "SKYPILOT_TASK_ID": "sky-managed-1",
            "SKYPILOT_NUM_NODES": str(number),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * number),
            "SKYPILOT_NUM_GPUS_PER_NODE": "0",
            "DISTTRAIN": str(folder / "disttrain"),
            "HOME": str(home),
            "TARGET": str(folder / "bucket"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        script = job["run"].replace(":29500", f":{port}")
        with (folder / "out.txt").open("a") as out:
            started.append(subprocess.Popen(["bash", "-c", script], env=variables, cwd=folder, stdout=out, stderr=out))
    return started


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_its_script_trains_on_all_machines_with_the_same_bits(tmp_path: Path, number: int) -> None:
    write_cfg(tmp_path)
    assert launch("cfg.py", "--runs", "one", cwd=tmp_path).code == 0
    started = machines(tmp_path, number)
    try:
        assert [machine.wait(400) for machine in started] == [0] * number, (tmp_path / "out.txt").read_text()
    finally:
        for machine in started:
            machine.kill()
    ended = result(tmp_path / "machine-0/runs/small")
    assert ended["world_size"] == number
    assert list((tmp_path / "bucket/small").glob("step-*"))
    assert ended["params_sha256"] == result(tmp_path / "one/small")["params_sha256"]


@pytest.mark.slow
def test_its_script_ends_with_the_code_of_the_run(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    [machine] = machines(tmp_path, 1, "max_epoch=3")
    assert machine.wait(400) == 2
    assert "did you mean max_epochs" in (tmp_path / "out.txt").read_text()
