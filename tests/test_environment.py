"""The variables of launchers: tables of their values, and a law over all topologies."""

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain import environment
from disttrain.environment import Launch, Topology, first_host, grace_s, launch_ids, read_launch, tasks_per_node
from disttrain.errors import BackendError, ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "n[03-05,9],m1",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_a_process_started_by_hand_has_no_launch() -> None:
    assert read_launch({}) is None
    assert read_launch({"HOME": "/root", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}) is None


def test_torchrun() -> None:
    topology = Topology(rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, num_nodes=2)
    assert read_launch(TORCHRUN) == Launch("torchrun", topology, "node-1", 29500, True, 3)


def test_the_six_variables_that_every_launcher_sets_are_enough() -> None:
    optional = [name for name in TORCHRUN if name.startswith(("GROUP", "TORCHELASTIC"))]
    topology = Topology(rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, num_nodes=2)
    assert read_launch(without(TORCHRUN, *optional)) == Launch("torchrun", topology, "node-1", 29500, False, 0)


def test_torchrun_inside_srun_wins() -> None:
    launch = read_launch({**SRUN, **TORCHRUN})
    assert launch is not None
    assert launch.launcher == "torchrun"


@pytest.mark.parametrize(
    "missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
)
def test_half_set_variables_are_named(missing: str) -> None:
    with pytest.raises(BackendError, match=rf"got .*=.* without {missing};"):
        read_launch(without(TORCHRUN, missing))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, r"the rank is below the number of ranks.*RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, r"the local rank is below the number of local ranks.*LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, r"a node has no more ranks than there are in all.*LOCAL_WORLD_SIZE=9"),
        ({"RANK": "0"}, r"the local rank is not above the rank.*RANK=0.*LOCAL_RANK=1"),
        ({"GROUP_RANK": "2"}, r"the node's rank is below the number of nodes.*GROUP_RANK=2, GROUP_WORLD_SIZE=2"),
        ({"RANK": "-1"}, r"RANK to be a whole number, got '-1'"),
        ({"WORLD_SIZE": "eight"}, r"WORLD_SIZE to be a whole number, got 'eight'"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"the local rank is below"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT to be a port from 1 to 65535, got 70000"),
        ({"MASTER_PORT": "x"}, r"MASTER_PORT to be a whole number"),
        ({"TORCHELASTIC_RESTART_COUNT": "often"}, r"TORCHELASTIC_RESTART_COUNT to be a whole number"),
    ],
)
def test_contradictions_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        read_launch({**TORCHRUN, **changes})


def test_srun() -> None:
    topology = Topology(rank=4, world_size=5, local_rank=1, local_world_size=2, node_rank=1, num_nodes=2)
    assert read_launch(SRUN) == Launch("slurm", topology, "n03", 24711, False, 0)


def test_an_address_that_the_user_set_wins_over_slurms() -> None:
    launch = read_launch({**SRUN, "MASTER_ADDR": "ib-3", "MASTER_PORT": "1234", "SLURM_RESTART_COUNT": "2"})
    assert launch is not None
    assert (launch.address, launch.port, launch.restarts) == ("ib-3", 1234, 2)


def test_steps_of_one_job_meet_at_different_ports() -> None:
    launches = [read_launch({**SRUN, "SLURM_STEP_ID": str(step)}) for step in range(10)]
    assert len({launch.port for launch in launches if launch is not None}) == 10


@pytest.mark.parametrize(
    "variables",
    [
        without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"),  # the batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash in an allocation of 5 tasks
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "5"},  # salloc's shell
    ],
)
def test_one_task_in_a_larger_allocation_is_one_process(variables: dict[str, str]) -> None:
    assert read_launch(variables) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_LOCALID": ""}, r"SLURM_PROCID=4 without SLURM_LOCALID"),
        ({"SLURM_PROCID": "5"}, r"the rank is below.*SLURM_PROCID=5"),
        ({"SLURM_LOCALID": "2"}, r"the local rank is below.*SLURM_LOCALID=2"),
        ({"SLURM_NODEID": "2"}, r"SLURM_NODEID below the 2 nodes of SLURM_TASKS_PER_NODE=3,2, got 2"),
        ({"SLURM_TASKS_PER_NODE": "3;2"}, r"SLURM_TASKS_PER_NODE in a form like 2\(x3\),1, got '3;2'"),
        ({"SLURM_STEP_NODELIST": ""}, r"SLURM_STEP_NODELIST in a form like n\[03-05,9\],m1, got ''"),
    ],
)
def test_impossible_variables_of_slurm_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        read_launch({**SRUN, **changes})


def test_older_slurms_set_the_tasks_of_a_node_only() -> None:
    launch = read_launch({**without(SRUN, "SLURM_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE": "4"})
    assert launch is not None
    assert launch.topology.local_world_size == 4


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("n[7,9]", "n7"),
        ("m1,n[03-05]", "m1"),
        ("rack[0-1]node[08-15]", "rack0node08"),
        ("gpu-a[1-2].cluster.org,gpu-b1", "gpu-a1.cluster.org"),
        ("n[001]", "n001"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 9)), min_size=1, max_size=9))
def test_tasks_per_node_is_run_length_coding(runs: list[tuple[int, int]]) -> None:
    text = ",".join(str(tasks) if times == 1 else f"{tasks}(x{times})" for tasks, times in runs)
    assert tasks_per_node("SLURM_TASKS_PER_NODE", text) == [tasks for tasks, times in runs for _ in range(times)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_every_topology_of_a_launcher_is_read(tasks: list[int], data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tasks) - 1))
    local = data.draw(st.integers(0, tasks[node] - 1))
    topology = Topology(sum(tasks[:node]) + local, sum(tasks), local, tasks[node], node, len(tasks))
    torchrun = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_WORLD_SIZE": topology.local_world_size,
        "GROUP_RANK": topology.node_rank,
        "GROUP_WORLD_SIZE": topology.num_nodes,
        "MASTER_ADDR": "a",
        "MASTER_PORT": 1,
    }
    slurm = {
        "SLURM_PROCID": topology.rank,
        "SLURM_STEP_NUM_TASKS": topology.world_size,
        "SLURM_LOCALID": topology.local_rank,
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks)),
        "SLURM_NODEID": topology.node_rank,
        "SLURM_STEP_NUM_NODES": topology.num_nodes,
        "SLURM_STEP_NODELIST": "a[1-6]",
        "SLURM_JOB_ID": 7,
    }
    for variables in (torchrun, slurm):
        launch = read_launch({name: str(value) for name, value in variables.items()})
        if launch is None:
            assert topology.world_size == 1
            assert variables is slurm
        else:
            assert launch.topology == topology


def test_a_launch_is_known_by_its_agent_and_a_requeued_job_by_its_number() -> None:
    assert launch_ids({}) == {}
    assert launch_ids({"RANK": "0", "WORLD_SIZE": "1"}) == {}  # ranks without an agent
    elastic = {"TORCHELASTIC_RUN_ID": "digits", "TORCHELASTIC_RESTART_COUNT": "0"}
    (agent,) = launch_ids(elastic)
    assert launch_ids({**elastic, "TORCHELASTIC_RESTART_COUNT": "2"}) == {agent: True}
    assert str(os.getppid()) in agent
    assert launch_ids({"DISTTRAIN_LAUNCH_ID": "7f3a"}) == {"launch 7f3a": True}
    assert launch_ids({"DISTTRAIN_LAUNCH_ID": ""}) == {}  # a pod's label that nobody has set
    assert launch_ids({"SLURM_JOB_ID": "12"}) == {"Slurm job 12": False}
    assert launch_ids({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}) == {"Slurm job 12": True}


def test_the_grace_of_ranks_is_that_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grace_s({}) == math.inf
    assert grace_s({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}) == 110.0  # a Kubernetes pod's, without torchrun
    assert grace_s({}, in_agent=True) == 30.0
    under_torchrun = {"TORCHELASTIC_RUN_ID": "digits"}
    assert grace_s(under_torchrun) == 30.0
    limited = {**under_torchrun, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}
    monkeypatch.setattr(environment, "TORCHRUN_READS_GRACE", True)
    assert grace_s(limited) == 110.0
    assert grace_s({**limited, "PET_SHUTDOWN_TIMEOUT": "60"}) == 60.0
    monkeypatch.setattr(environment, "TORCHRUN_READS_GRACE", False)
    assert grace_s(limited) == 30.0
    for bad in ("2m", "-1", "3000000"):
        with pytest.raises(ConfigError, match=f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT to be .* seconds, got '{bad}'"):
            grace_s({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": bad})
