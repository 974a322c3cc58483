"""`disttrain launch --ranks N`: its options become words that torchrun's own parser and the ranks understand."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.run import parse_args

from disttrain.commands import start_ranks as module
from disttrain.commands.launch import launch_parser
from disttrain.commands.start_ranks import start_ranks, take_defaults
from disttrain.errors import ConfigError

CFG = """
from functools import partial
from torch import nn, optim
from disttrain import Config
config = Config(
    name="tiny", model=nn.Identity, train_data=list, loss=nn.MSELoss(), optimizer=partial(optim.SGD, lr=0.1),
    global_batch_size=8, num_slots=8, max_epochs=1, metrics={"mine": nn.Identity},
)
"""


class Torchrun:
    """In the place of `run_torchrun`: keeps its arguments, starts nothing, and returns an exit code."""

    def __call__(
        self, words: list[str], name: str, arguments: list[str], *rest: Any, grace_s: int | None, **more: Any
    ) -> int:
        self.options, self.arguments, self.grace_s = parse_args([*words, "-m", name, *arguments]), arguments, grace_s
        self.variables, self.preload = rest
        self.silence_s = more["silence_s"]
        return 75


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Torchrun:
    torchrun = Torchrun()
    monkeypatch.setattr(module, "run_torchrun", torchrun)
    return torchrun


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("start_ranks") / "cfg.py"
    path.write_text(CFG)
    return str(path)


def typed(*words: str) -> int:
    return start_ranks(launch_parser().parse_intermixed_args(words))


def test_one_host(cfg: str, torchrun: Torchrun) -> None:
    assert typed(cfg, "--ranks", "3", "cpu_threads=2") == 75
    assert torchrun.options.standalone
    assert (torchrun.options.nproc_per_node, torchrun.options.max_restarts) == ("3", 3)
    assert (torchrun.options.module, torchrun.options.training_script) == (True, "disttrain.launch")
    assert torchrun.variables["OMP_NUM_THREADS"] == "1"  # torch's own number is set by each rank
    assert torchrun.grace_s is None
    assert "torchmetrics" in torchrun.preload  # the config has a metric


def test_a_launch_that_recovers_in_place_and_how_long_it_waits_for_signs_of_life(cfg: str, torchrun: Torchrun) -> None:
    for words, expected in (([], None), (["--recover"], 10.0), (["--recover", "--silence", "2.5"], 2.5)):
        typed(cfg, "--ranks", "3", *words)
        assert torchrun.silence_s == expected
        assert torchrun.options.monitor_interval == (0.2 if expected is None else 0.01)


def test_several_hosts(cfg: str, torchrun: Torchrun) -> None:
    rendezvous = ("--nodes", "2:4", "--rdzv", "node-1:29500", "--max-restarts", "7", "--grace", "60")
    for words, is_host in ((rendezvous, True), ((*rendezvous, "--no-rdzv-host"), False)):
        typed(cfg, "--ranks", "8", *words)
        options = torchrun.options
        assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2:4", "8", 7)
        assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node-1:29500", "tiny")
        assert ("is_host=false" in options.rdzv_conf) != is_host
        assert torchrun.grace_s == 60


OVERRIDES = st.lists(st.sampled_from(["seed=3", "grad_clip_norm=none", "optimizer.lr=3e-4"]), unique=True)


@settings(max_examples=15)
@given(OVERRIDES, st.booleans(), st.booleans(), st.sampled_from(["runs", "/data/my runs"]))
def test_the_ranks_get_the_config_the_overrides_and_the_options(
    cfg: str, overrides: list[str], fresh: bool, traceback: bool, runs: str
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        torchrun = Torchrun()
        monkeypatch.setattr(module, "run_torchrun", torchrun)
        words = ["--fresh"] * fresh + ["--traceback"] * traceback
        typed(cfg, "--ranks", "2", *words, "--runs", runs, *overrides)
        got = launch_parser().parse_intermixed_args(torchrun.arguments)
        assert (got.config, got.overrides, got.runs) == (cfg, overrides, Path(runs))
        assert (got.fresh, got.traceback, got.ranks, got.grace) == (fresh, traceback, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "expected --ranks to be at least 1, got 0"),
        (["--ranks", "2", "--nodes", "2"], "expected --nodes and --rdzv together, got --nodes 2 and --rdzv None"),
        (["--ranks", "2", "--rdzv", "a:1"], "expected --nodes and --rdzv together, got --nodes 1 and --rdzv a:1"),
        (["--ranks", "2", "max_epoch=3"], "max_epochs"),
        (["--ranks", "2", "--silence", "5"], "expected --silence 5 with --recover, got it alone; add --recover"),
        (["--ranks", "2", "--recover", "--silence", "0.5"], "--silence to be from 1 to 3600 seconds, got 0.5"),
    ],
)
def test_a_mistake_is_an_error_before_anything_starts(
    cfg: str, torchrun: Torchrun, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(cfg, *words)
    assert not hasattr(torchrun, "options")


POD = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "job-0", "PET_MASTER_PORT": "23456"}


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**POD, "PET_NODE_RANK": "1", "PET_MAX_RESTARTS": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.usefixtures("pod")
def test_a_pod_takes_its_launch_from_torchruns_variables(
    cfg: str, torchrun: Torchrun, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, ranks in (([], "4"), (["--ranks", "2"], "2")):
        options = launch_parser().parse_intermixed_args([cfg, *words])
        take_defaults(options)
        start_ranks(options)
        got = torchrun.options
        assert (got.nnodes, got.nproc_per_node, got.rdzv_endpoint, got.max_restarts) == ("2", ranks, "job-0:23456", 9)
        assert "is_host=false" in got.rdzv_conf
    assert capsys.readouterr().out.splitlines() == [
        "from the environment's PET_ variables: --ranks 4 --nodes 2 --rdzv job-0:23456",
        "from the environment's PET_ variables: --nodes 2 --rdzv job-0:23456",
    ]


@pytest.mark.usefixtures("pod")
def test_what_is_typed_wins(cfg: str, torchrun: Torchrun) -> None:
    options = launch_parser().parse_intermixed_args([cfg, "--ranks", "2", "--nodes", "1"])
    take_defaults(options)
    start_ranks(options)
    assert torchrun.options.standalone


@pytest.mark.usefixtures("pod")
def test_half_a_launch_in_the_environment_is_no_default(cfg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PET_MASTER_ADDR")
    options = launch_parser().parse_intermixed_args([cfg])
    take_defaults(options)
    assert (options.ranks, options.nodes, options.rdzv) == (None, None, None)
