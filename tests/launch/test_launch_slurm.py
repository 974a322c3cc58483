"""launch/slurm by a real Slurm with three nodes on this machine, if it is installed and may run.

apt-get install --no-install-recommends slurmctld slurmd slurm-client munge     # and be root
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
sys.path.insert(0, str(ROOT / "tests" / "integration"))  # commands.py

from commands import launch, lines, result, write_cfg  # noqa: E402

MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed here: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting a Slurm needs root"),
]

NODES = 3
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=c[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=2 RealMemory=2000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=c[1-{nodes}] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=hi Nodes=c[1-{nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

# Steps of 0.3 s, to leave time for a signal; the file shows that the training has begun.
SLOW = """
import pathlib, time
from disttrain.engine import Events
def slow(trainer, run):
    def step():
        pathlib.Path("begun").touch()
        time.sleep(0.3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
fields.update(handlers=[slow], max_epochs=12)
"""

NOTES_ITS_PROCESS = """
import os
pathlib.Path("pid-" + os.environ["SLURM_PROCID"]).write_text(str(os.getpid()))
fields.update(checkpoint={"every_steps": 2})
"""


class Slurm:
    """A Slurm in a folder; its daemons end with `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", *(f"spool-c{node}" for node in range(1, NODES + 1))):
            (folder / name).mkdir()
        conf = folder / "slurm.conf"
        ports = {"port": 26817, "first": 27001, "last": 27000 + NODES}
        conf.write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], nodes=NODES, **ports))
        self.environment = {**os.environ, "SLURM_CONF": str(conf)}
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folder.chmod(0o755)
        munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "sock"), ("pid-file", "pid"))]
        munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed", f"--key-file={key}"]
        self.daemons = [self.daemon("munged", "-F", "-f", *munge)]
        time.sleep(1)
        self.daemons.append(self.daemon("slurmctld", "-D", "-c"))
        self.daemons += [self.daemon("slurmd", "-D", "-N", f"c{node}") for node in range(1, NODES + 1)]
        self.wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), 30)

    def daemon(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{words[0]}.out").open("a") as out:
            return subprocess.Popen(words, env=self.environment, stdout=out, stderr=out, cwd=self.folder)

    def ask(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            words, env={**self.environment, **variables}, cwd=cwd, capture_output=True, text=True, check=False
        )
        return (done.stdout + done.stderr).strip()

    def submit(self, folder: Path, *words: str, script: str = "job.sh") -> str:
        """Queue the run of `folder` on two nodes; return the number of the job."""
        options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=0", "--output=out.txt", "--parsable"]
        variables = {"PYTHON": sys.executable, "RDZV_HOST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}
        output = self.ask("sbatch", *options, *words, str(SCRIPTS / script), "cfg.py", cwd=folder, **variables)
        assert output.isdigit(), output
        return output

    def state(self, job: str) -> str:
        shown = self.ask("scontrol", "show", "job", job)
        return dict(part.partition("=")[::2] for part in shown.split()).get("JobState", shown)

    def wait_until(self, holds: Callable[[], bool], timeout_s: float) -> float:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < timeout_s, self.ask("scontrol", "show", "job")
            time.sleep(0.2)
        return time.monotonic() - began

    def finish(self, job: str, folder: Path) -> None:
        """Wait until the requeued job is completed; Slurm would start it only after two minutes, so start it now."""
        self.wait_until(lambda: self.state(job) == "PENDING", 90)
        end = time.monotonic() + 150
        while self.state(job) != "COMPLETED":
            assert time.monotonic() < end, (folder / "out.txt").read_text()
            if self.state(job) == "PENDING":
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)

    def stop(self) -> None:
        self.ask("scancel", "--state=RUNNING,PENDING", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    running = Slurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_cfg(folder, SLOW.replace("time.sleep(0.3)", ""))
    assert launch("cfg.py", cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("how", ["warning", "preemption", "time limit"])
def test_a_job_that_has_to_stop_saves_is_requeued_and_ends_with_the_same_bits(
    slurm: Slurm, whole: Path, tmp_path: Path, how: str
) -> None:
    # Long enough to outlast its time limit, which Slurm counts in minutes.
    write_cfg(tmp_path, SLOW if how != "time limit" else SLOW.replace("0.3", "1.5"))
    limit = ["--time", "3", "--signal=B:USR1@90"] if how == "time limit" else ["--time", "60"]
    job = slurm.submit(tmp_path, "--partition", "low", *limit)
    slurm.wait_until((tmp_path / "begun").exists, 90)
    urgent = ""
    if how == "warning":
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
    elif how == "preemption":
        urgent = slurm.ask(
            "sbatch", "--parsable", "-p", "hi", "--nodes=3", "--exclusive", "--wrap", "sleep 5", cwd=tmp_path
        )
        assert urgent.isdigit(), urgent
    took_s = slurm.wait_until(lambda: (tmp_path / "runs/small/result.json").exists(), 120)
    print(f"{how}: saved after {took_s:.1f} s")
    assert result(tmp_path / "runs/small")["status"] == "interrupted"
    slurm.finish(job, tmp_path)
    ended = result(tmp_path / "runs/small")
    assert ended["status"] == "completed"
    assert ended["world_size"] == 2
    assert ended["params_sha256"] == result(whole / "runs/small")["params_sha256"]
    assert lines(tmp_path / "runs/small/metrics/valid.jsonl") == lines(whole / "runs/small/metrics/valid.jsonl")
    assert "resuming from step" in (tmp_path / "out.txt").read_text()


@pytest.mark.parametrize("how", ["warning", "killed rank"])
def test_ranks_that_srun_started_save_or_come_back_without_torchrun(
    slurm: Slurm, whole: Path, tmp_path: Path, how: str
) -> None:
    write_cfg(tmp_path, SLOW + NOTES_ITS_PROCESS)
    job = slurm.submit(tmp_path, "--partition", "low", "--time", "60", script="srun_job.sh")
    slurm.wait_until((tmp_path / "runs/small/checkpoints/step-00000004").exists, 120)
    if how == "warning":
        slurm.ask("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_until((tmp_path / "runs/small/result.json").exists, 120)
        assert result(tmp_path / "runs/small")["status"] == "interrupted"
    else:
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    slurm.finish(job, tmp_path)
    ended = result(tmp_path / "runs/small")
    assert (ended["status"], ended["world_size"]) == ("completed", 2)
    assert ended["params_sha256"] == result(whole / "runs/small")["params_sha256"]
    text = (tmp_path / "out.txt").read_text()
    assert "resuming from step" in text
    assert "torchrun" not in text


def test_a_mistake_under_srun_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    write_cfg(tmp_path, "def wrong(y_pred, y):\n    raise ValueError('on purpose')\nfields.update(loss=wrong)\n")
    job = slurm.submit(tmp_path, "--partition", "low", "--time", "60", script="srun_job.sh")
    slurm.wait_until(lambda: slurm.state(job) == "FAILED", 120)
    assert "ExitCode=2:0" in slurm.ask("scontrol", "show", "job", job)
