"""torchrun's variables count where they say a whole launch, and are hidden from torchrun's parser otherwise."""

import os

import pytest
import torch
from torch.distributed.run import config_from_args, parse_args

from disttrain.errors import ConfigError
from disttrain.launching.pet_variables import HostsAsSet, hidden_variables, hosts_as_set

POD = {
    "PET_NNODES": "3",
    "PET_NPROC_PER_NODE": "4",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NODE_RANK": "2",
}
ELASTIC = {
    "PET_NNODES": "1:4",
    "PET_NPROC_PER_NODE": "8",
    "PET_RDZV_ENDPOINT": "job-worker-0:23456",
    "PET_MAX_RESTARTS": "30",
}


def test_a_pod_of_a_job_with_a_master() -> None:
    assert hosts_as_set(environ=POD) == HostsAsSet(4, "3", "job-master-0:23456", False, None)
    master = hosts_as_set(environ={**POD, "PET_NODE_RANK": "0"})
    assert master is not None
    assert master.opens_store is True


def test_a_pod_of_an_elastic_job() -> None:
    assert hosts_as_set(environ=ELASTIC) == HostsAsSet(8, "1:4", "job-worker-0:23456", None, 30)
    assert hosts_as_set(2, ELASTIC) == HostsAsSet(2, "1:4", "job-worker-0:23456", None, 30)


def test_one_host_needs_no_address() -> None:
    assert hosts_as_set(environ={**POD, "PET_NNODES": "1"}) == HostsAsSet(4, "1", None, None, None)


@pytest.mark.parametrize("missing", ["PET_NNODES", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT"])
def test_half_a_launch_says_nothing(missing: str) -> None:
    assert hosts_as_set(environ={name: value for name, value in POD.items() if name != missing}) is None


def test_a_rank_takes_no_defaults() -> None:
    assert hosts_as_set(environ={**POD, "LOCAL_RANK": "0"}) is None


def test_ranks_may_be_a_word_of_torchrun() -> None:
    found = hosts_as_set(environ={**POD, "PET_NPROC_PER_NODE": "cpu"})
    assert found is not None
    assert found.ranks == torch._utils.cpu_count()


@pytest.mark.parametrize(("name", "value"), [("PET_NPROC_PER_NODE", "many"), ("PET_NODE_RANK", "first")])
def test_a_value_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"expected {name} to be .*, got '{value}'"):
        hosts_as_set(environ={**POD, name: value})


def test_torchruns_parser_does_not_see_what_the_command_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"PET_NNODES": "2", "PET_RDZV_CONF": "timeout=1", "PET_ROLE": "mine"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with hidden_variables():
        config = config_from_args(parse_args(["--nproc-per-node", "2", "script.py"]))[0]
    assert (config.max_nodes, config.rdzv_configs, config.role) == (1, {"rank": 0, "timeout": 900}, "mine")
    assert variables.items() <= os.environ.items()
