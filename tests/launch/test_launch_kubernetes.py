"""launch/kubernetes without a cluster: the manifests against the real schemas, and their pods as processes here.

The schemas: Kubeflow's models of JobSet, TrainJob, TrainingRuntime, Job and Service (kubeflow-trainer-api, made of the
operators' OpenAPI), and Kubernetes' own JSON schemas of Job and Service (kubernetes-validate, by `make slow`). What the
API server checks beyond its schemas is checked here as far as it concerns these manifests.
"""

import copy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))  # commands.py

from commands import environment, launch, result, write_cfg  # noqa: E402

from disttrain.commands.launch import MEANINGS  # noqa: E402
from disttrain.environment import GRACE_VARIABLES  # noqa: E402
from disttrain.pod import TERMINATION_LOG  # noqa: E402

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'disttrain[test]'")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="Kubeflow's models: pip install 'disttrain[test]'")

MANIFESTS = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))
MODELS = {
    "Service": models.IoK8sApiCoreV1Service,
    "Job": models.IoK8sApiBatchV1Job,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
JOBSET_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")  # of JobSet 0.6 and newer
SPARE_S = 10
"""From the end of the ranks to the end of their pod."""

Object = dict[str, Any]


def objects(path: Path) -> dict[str, Object]:
    """Return the objects of a manifest by their kinds."""
    return {each["kind"]: each for each in yaml.safe_load_all(path.read_text())}


def job_spec(path: Path) -> Object:
    """Return the specification of the manifest's Job, wherever it is."""
    kinds = objects(path)
    if "Job" in kinds:
        return kinds["Job"]["spec"]
    inside = kinds["JobSet"]["spec"] if "JobSet" in kinds else kinds["TrainingRuntime"]["spec"]["template"]["spec"]
    [replicated] = inside["replicatedJobs"]
    return replicated["template"]["spec"]


def complaints(each: Object) -> list[str]:
    """Return the mistakes in an object by the schema of its kind: fields unknown, missing or of another type."""
    model = MODELS[each["kind"]]
    try:
        known = model.from_dict(copy.deepcopy(each)).to_dict()
    except ValueError as error:  # pydantic's ValidationError
        return [str(error)]
    return [] if known == each else [f"the schema knows {known}, got {each}"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_keeps_to_the_operators_schemas(path: Path) -> None:
    assert [text for each in objects(path).values() for text in complaints(each)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.completion", 2),
        ("spec.completions", "2"),
        ("spec.completionMode", "indexed"),
        ("spec.podFailurePolicy.rules.0.action", "FailTheJob"),
        ("spec.podFailurePolicy.rules.0.onExitCodes.operator", None),
        ("spec.podFailurePolicy.rules.0.onExitCodes.value", [2]),
        ("spec.template.spec.terminationGracePeriod", 120),
        ("spec.template.spec.containers.0.env.0.value", 2),
        ("spec.template.spec.containers.0.name", None),
    ],
)
def test_the_schemas_find_a_planted_mistake(path: str, value: Any) -> None:
    job = objects(ROOT / "launch/kubernetes/indexed_job.yaml")["Job"]
    *way, last = path.split(".")
    inside: Any = job
    for name in way:
        inside = inside[int(name) if name.isdecimal() else name]
    inside[last] = value
    if value is None:
        del inside[last]
    assert complaints(job)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_codes_and_times_agree_with_ours(path: Path) -> None:
    spec = job_spec(path)
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert spec["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["values"] == sorted(set(rule["onExitCodes"]["values"]))
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert actions == {2: "FailJob", 75: "Ignore"}  # 0 is success, 1 counts for backoffLimit
    assert set(actions) | {0, 1} == set(MEANINGS)
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert int(values[GRACE_VARIABLES[1]]) + SPARE_S == pod["terminationGracePeriodSeconds"]
    assert "DISTTRAIN_LAUNCH_ID" in values
    assert values[TERMINATION_LOG] == "/dev/termination-log"  # terminationMessagePath, if nobody sets another
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["shareProcessNamespace"]


@pytest.mark.parametrize("name", ["indexed_job.yaml", "jobset.yaml"])
def test_the_pods_meet_at_the_name_of_pod_0(name: str) -> None:
    spec, kinds = job_spec(ROOT / "launch/kubernetes" / name), objects(ROOT / "launch/kubernetes" / name)
    assert spec["completionMode"] == "Indexed"
    [container] = spec["template"]["spec"]["containers"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert int(values["PET_NNODES"]) == spec["completions"] == spec["parallelism"]
    if "Job" in kinds:
        own = kinds["Job"]["metadata"]["name"]
        service = kinds["Service"]
        assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": own}
        assert service["spec"]["clusterIP"] == "None"
        assert values["PET_MASTER_ADDR"] == f"{own}-0.{service['metadata']['name']}"
    else:
        own = kinds["JobSet"]["metadata"]["name"]
        [replicated] = kinds["JobSet"]["spec"]["replicatedJobs"]
        assert values["PET_MASTER_ADDR"] == f"{own}-{replicated['name']}-0-0.{own}"


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_a_mistake_fails_the_whole_set(name: str) -> None:
    kinds = objects(ROOT / "launch/kubernetes" / name)
    inside = kinds["JobSet"]["spec"] if "JobSet" in kinds else kinds["TrainingRuntime"]["spec"]["template"]["spec"]
    [rule] = inside["failurePolicy"]["rules"]
    assert rule["action"] in JOBSET_ACTIONS
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_trainjob_uses_the_runtime_and_kubeflows_names() -> None:
    kinds = objects(ROOT / "launch/kubernetes/trainjob.yaml")
    reference = kinds["TrainJob"]["spec"]["runtimeRef"]
    runtime = kinds["TrainingRuntime"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert runtime["apiVersion"] == f"{reference['apiGroup']}/v1alpha1"
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert replicated["name"] == container["name"] == "node"  # the operator sets the PET_ variables in that container
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


@pytest.mark.slow
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_jobs_and_services_keep_to_kubernetes_own_schemas(path: Path) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="Kubernetes' schemas are not installed: pip install 'disttrain[launchers]'"
    )
    kinds = objects(path)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": job_spec(path)}
    for each in [job, *[kinds[kind] for kind in kinds if kind == "Service"]]:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version()[:-2], strict=True)
    job["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version()[:-2], strict=True)


class Pods:
    """The pods of a manifest as processes of this machine; `ended` follows the rules of its podFailurePolicy."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.spec, self.folder = job_spec(path), folder
        [self.container] = self.spec["template"]["spec"]["containers"]
        job = objects(path).get("TrainJob")
        self.words = [*self.container["command"], *(self.container if job is None else job["spec"]["trainer"])["args"]]
        self.count = self.spec["completions"] if job is None else job["spec"]["trainer"]["numNodes"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.pods = [self.start(index) for index in range(self.count)]

    def start(self, index: int) -> subprocess.Popen[bytes]:
        here = {"/job/cfg.py": f"{self.folder}/cfg.py", "/runs": f"{self.folder}/runs"}
        words = [here.get(word, word) for word in self.words]
        assert words[:3] == ["disttrain", "launch", f"{self.folder}/cfg.py"]
        # Of a TrainJob the operator sets them.
        values = {"PET_NNODES": str(self.count), "PET_NPROC_PER_NODE": "1"}
        values |= {each["name"]: each["value"] for each in self.container["env"] if "value" in each}
        values |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": self.port, "PET_NODE_RANK": str(index)}
        self.log(index).touch()
        values |= {TERMINATION_LOG: str(self.log(index)), "DISTTRAIN_LAUNCH_ID": "uid-of-the-job"}
        words.append("--fresh")  # it counts once, not in each new pod
        with (self.folder / f"pod-{index}.txt").open("a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", *words], env={**environment(), **values}, cwd=self.folder, stdout=out, stderr=out
            )

    def log(self, index: int) -> Path:
        return self.folder / f"termination-{index}"

    def action(self, code: int) -> str:
        """Return the action of Kubernetes on a pod that ended with this code."""
        for rule in self.spec["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []):
                return str(rule["action"])
        return "Count" if code else "Succeed"

    def wait(self) -> list[str]:
        return [self.action(pod.wait(180)) for pod in self.pods]

    def output(self) -> str:
        return "".join((self.folder / f"pod-{index}.txt").read_text() for index in range(self.count))

    def stop(self) -> None:
        for pod in self.pods:
            pod.kill()
            pod.wait()


SLOW = """
import pathlib, time
from disttrain.engine import Events
def slow(trainer, run):
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: (pathlib.Path("begun").touch(), time.sleep(0.3)))
fields.update(handlers=[slow], max_epochs=12)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_that_are_evicted_save_and_come_back_to_the_same_bits(path: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    write_cfg(whole, SLOW.replace("0.3", "0"))
    assert launch("cfg.py", cwd=whole).code == 0
    write_cfg(tmp_path, SLOW)
    pods = Pods(path, tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline, pods.output()
            time.sleep(0.1)
        pods.pods[1].send_signal(signal.SIGTERM)
        assert pods.wait() == ["Ignore"] * pods.count, pods.output()
        for index in range(pods.count):
            assert "interrupted by a signal; the same command resumes it" in pods.log(index).read_text()
        write_cfg(tmp_path, SLOW.replace("0.3", "0"))
        pods.pods = [pods.start(index) for index in range(pods.count)]
        assert pods.wait() == ["Succeed"] * pods.count, pods.output()
    finally:
        pods.stop()
    ended = result(tmp_path / "runs/small")
    assert (ended["status"], ended["world_size"]) == ("completed", pods.count)
    assert ended["params_sha256"] == result(whole / "runs/small")["params_sha256"]
    assert [pods.log(index).read_text().endswith("completed") for index in range(pods.count)] == [True] * pods.count


@pytest.mark.slow
def test_a_mistake_fails_the_job_and_each_pod_says_which(tmp_path: Path) -> None:
    write_cfg(tmp_path, "def wrong(y_pred, y):\n    raise ValueError('on purpose')\nfields.update(loss=wrong)\n")
    pods = Pods(ROOT / "launch/kubernetes/indexed_job.yaml", tmp_path)
    try:
        assert "FailJob" in pods.wait(), pods.output()
    finally:
        pods.stop()
    reasons = [pods.log(index).read_text() for index in range(pods.count)]
    assert any("cfg.py:" in reason and "on purpose" in reason for reason in reasons), reasons
