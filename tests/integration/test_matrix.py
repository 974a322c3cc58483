"""One hash per model, on any number of ranks, with any number of workers, killed at any step.

The models are an MLP with dropout, a CNN with BatchNorm and a small GPT in bf16. Ranks are real gloo processes that run
the launcher; kills are SIGKILLs.
"""

from pathlib import Path

import pytest

from disttrain.commands.compare import compare_runs
from disttrain.commands.scenarios import Life, Scenario, killed
from disttrain.commands.verification import Verification
from disttrain.config import load_config
from disttrain.run.directory import RunDirectory

CONFIGS = Path(__file__).parent / "matrix"
MODELS = ("mlp", "cnn", "gpt")
NUM_STEPS = 30
PLACES = [(ranks, workers) for workers in (0, 1, 3) for ranks in (1, 2, 3, 4, 8)]
SOME_PLACES = [(2, 3), (8, 1), (3, 0)]  # one for each model; the slow tests below run all combinations
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Verification, RunDirectory]]:
    """Train each model without interruption, in one process without workers."""
    by_model = {}
    for model in MODELS:
        cfg = CONFIGS / f"{model}.py"
        folder = tmp_path_factory.mktemp(model)
        verification = Verification(cfg, load_config(cfg), [], folder, num_slots=8, num_steps=NUM_STEPS)
        by_model[model] = verification, verification.run(Scenario("reference", (Life(1, 0),)))
    return by_model


def check(references: dict[str, tuple[Verification, RunDirectory]], model: str, scenario: Scenario) -> None:
    """Run a scenario and compare every step, the whole ledger and the final weights with the reference."""
    verification, reference = references[model]
    run = verification.run(scenario)
    compared = compare_runs(reference, run)
    assert compared.same, compared.difference
    assert (compared.num_steps, compared.num_hashed, compared.configs) == (NUM_STEPS, NUM_STEPS + 1, ())
    for name in ("ledger.jsonl", "metrics/train.jsonl"):
        assert (run.path / name).read_bytes() == (reference.path / name).read_bytes(), name
    assert compared.weights[0] is not None


def test_the_models_learn_and_differ(references: dict[str, tuple[Verification, RunDirectory]]) -> None:
    results = [run.result() or {} for _, run in references.values()]
    assert len({result["params_sha256"] for result in results}) == len(MODELS)
    assert [result["step"] for result in results] == [NUM_STEPS] * len(MODELS)


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=slow), pytest.param("gpt", marks=slow)])
def test_other_ranks_and_workers_give_the_same_bits(
    references: dict[str, tuple[Verification, RunDirectory]], model: str
) -> None:
    ranks, workers = SOME_PLACES[MODELS.index(model)]
    check(references, model, Scenario("elsewhere", (Life(ranks, workers),)))


@slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_on_8_ranks_then_3_then_5_gives_the_same_bits(
    references: dict[str, tuple[Verification, RunDirectory]], model: str
) -> None:
    check(references, model, Scenario("killed", (Life(8, 1, 11), Life(3, 0, 23), Life(5, 3))))


@slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("ranks", "workers"), PLACES)
def test_all_ranks_with_all_workers_give_the_same_bits(
    references: dict[str, tuple[Verification, RunDirectory]], model: str, ranks: int, workers: int
) -> None:
    check(references, model, Scenario(f"all {ranks} and {workers}", (Life(ranks, workers),)))


@slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_at_every_step_gives_the_same_bits(
    references: dict[str, tuple[Verification, RunDirectory]], model: str
) -> None:
    scenario = killed("every step", [3, 1, 2, 4, 1, 8, 2], [0, 1, 3], NUM_STEPS, NUM_STEPS)
    assert [life.killed_at for life in scenario.lives] == [*range(1, NUM_STEPS + 1), None]
    check(references, model, scenario)
