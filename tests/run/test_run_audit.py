"""Audited steps: planted faults are found and named, and change no bit of what is kept."""

import json
from pathlib import Path
from typing import Any

import audit_faults
import pytest
from audit_faults import AUDITED, IN_SLOTS, IN_STATE, LEDGER, SENT, Planted, ends_with, random_faults, run_on
from ranks import Ranks
from torchmetrics import MeanSquaredError

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "weight": {"weight": audit_faults.rows_above_zero},
    "values": {"loss": None, "forward": audit_faults.with_values},
    "metrics": {"train_metrics": {"error": MeanSquaredError}},
    "global_loss": {"loss": None, "forward": audit_faults.embeddings, "global_loss": audit_faults.spread},
    "fast": {"reduction": "fast"},
    "in place": {"loss": None, "forward": audit_faults.changing_its_batch},
}


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "small" / "ledger.jsonl").read_text().splitlines()]


def curves(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "small" / "metrics" / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "small" / "audits.jsonl").read_text().splitlines()]


def compared(ranks: Ranks, folder: Path, world_size: int, faults: list[Planted], **changes: Any) -> list[Any]:
    """Run without audit and faults, and with both; the ledgers are the same. Return the ends of the second by rank."""
    folders = [folder / "without", folder / "with"]
    for each in folders:
        each.mkdir()
    timeout_s = 60.0 + 5.0 * len(faults)
    ranks(world_size, run_on, str(folders[0]), [], LEDGER | changes, timeout_s=timeout_s)
    ends = ranks(world_size, run_on, str(folders[1]), faults, AUDITED | changes, timeout_s=timeout_s)
    assert ledger(folders[0]) == ledger(folders[1])
    assert curves(folders[0]) == curves(folders[1])
    return ends


def assert_each_is_named(ends: list[Any], faults: list[Planted]) -> None:
    """Assert that exactly the planted faults were found, with their ranks and kinds, and written down."""
    lines = ends[0]["result"]["audit"]["faults"]
    written = {line["step"]: line for line in lines}  # the last of each step, which a persistent fault ends
    assert {(line["step"], line.get("rank")) for line in lines} == {(fault.step, fault.rank) for fault in faults}
    for fault in faults:
        line = written.pop(fault.step)
        assert line["rank"] == fault.rank, (line, fault)
        if fault.part not in IN_STATE:
            assert line["kind"] == ("persistent" if fault.persistent else "transient"), (line, fault)
        assert line["host"]
        assert line["device"] == "cpu"
    assert not written


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_audit_changes_no_bit(ranks: Ranks, tmp_path: Path, world_size: int) -> None:
    ends = compared(ranks, tmp_path, world_size, [])
    assert ends[0]["result"]["audit"] == {"steps": 4, "faults": []}


@pytest.mark.parametrize("name", ["bf16", "fp16", "weight", "values", "metrics", "global_loss", "fast", "in place"])
def test_a_fault_changes_no_bit_in_any_kind_of_run(ranks: Ranks, tmp_path: Path, name: str) -> None:
    # With a global loss the first pass is not audited, and the second one begins with gradients that are known.
    fault = Planted("gradient" if name == "global_loss" else "activation", rank=1, step=2, call=1, bit=22)
    ends = compared(ranks, tmp_path, 2, [fault], **KINDS[name])
    assert_each_is_named(ends, [fault])


def test_dozens_of_faults_are_found_and_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    faults = random_faults(1, 3, range(2, 38))
    assert {fault.part for fault in faults} == {*IN_SLOTS, *IN_STATE, *SENT}
    ends = compared(ranks, tmp_path, 3, faults, max_steps=40)
    assert_each_is_named(ends, faults)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_hundreds_of_faults_are_found_and_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    faults = random_faults(2, 3, range(2, 302))
    ends = compared(ranks, tmp_path, 3, faults, max_steps=310)
    assert_each_is_named(ends, faults)


@pytest.mark.parametrize("persistent", [False, True])
def test_two_ranks_tell_what_passes_and_say_what_they_cannot_decide(
    ranks: Ranks, tmp_path: Path, persistent: bool
) -> None:
    faults = [
        Planted("activation", rank=1, step=2, call=1, persistent=persistent),
        Planted("gradient", rank=1, step=3, call=1, persistent=persistent),
    ]
    ends = compared(ranks, tmp_path, 2, faults)
    lines = ends[0]["result"]["audit"]["faults"]
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        if persistent:
            assert (line["kind"], line["ranks"]) == ("undecided", [0, 1])
        else:
            assert (line["kind"], line["rank"]) == ("transient", 1)


def test_one_rank_finds_what_passes(ranks: Ranks, tmp_path: Path) -> None:
    faults = [Planted("activation", rank=0, step=2, call=9), Planted("gradient", rank=0, step=3, call=2)]
    assert_each_is_named(compared(ranks, tmp_path, 1, faults), faults)


def test_fsdp_audits_its_slots(ranks: Ranks, tmp_path: Path) -> None:
    faults = [Planted("activation", rank=2, step=2, call=0), Planted("activation", rank=0, step=3, persistent=True)]
    assert_each_is_named(compared(ranks, tmp_path, 3, faults, strategy="fsdp"), faults)


def test_a_persistent_fault_ends_the_run_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    texts = ranks(3, ends_with, str(tmp_path), [Planted("gradient", rank=2, step=3, persistent=True)], AUDITED)
    assert len(set(texts)) == 1
    assert "the audit of step 3 found a faulty rank by slot" in texts[0]
    assert "rank 2 (host " in texts[0]
    assert "since step 2, the last one that passed an audit" in texts[0]
    assert [line["rank"] for line in lines_of(tmp_path)] == [2] * len(lines_of(tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_there_is_no_alarm_in_twenty_thousand_clean_steps(ranks: Ranks, tmp_path: Path) -> None:
    changes = AUDITED | {"max_steps": 20_000, "num_slots": 3, "global_batch_size": 12, "ledger": {"every_steps": 5000}}
    ends = ranks(3, run_on, str(tmp_path), [], changes | {"log": {"every_steps": 100}}, timeout_s=2900)
    assert ends[0]["result"]["audit"] == {"steps": 20_000, "faults": []}
