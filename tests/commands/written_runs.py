"""Run directories that were written without a run, for tests of what compares them."""

import json
from pathlib import Path
from typing import Any

from disttrain.run.directory import RunDirectory

NUM_STEPS = 5


def write_run(
    path: Path,
    *,
    num_steps: int = NUM_STEPS,
    bad_step: int | None = None,
    every_steps: int = 1,
    evaluations: dict[int, dict[str, Any]] | None = None,
) -> RunDirectory:
    """Write a run directory whose loss is another one at `bad_step`, with hashes every `every_steps` steps."""
    path.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "state": {"model.a": "0"}}]
    for step in range(1, num_steps + 1):
        loss = (2.0 if step == bad_step else 1 / step).hex()
        lines.append({"step": step, "epoch": 1, "loss": loss, "grad_norm": None, "learning_rate": (0.1).hex()})
        if step % every_steps == 0:
            lines[-1]["state"] = {"model.a": str(step)}
    run = RunDirectory(path)
    run.ledger_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.config_json.write_text(json.dumps({"fields": {"name": "x"}, "hash": "", "folder": None}))
    run.result_json.write_text(json.dumps({"step": num_steps, "params_sha256": "0123456789abcdef"}))
    run.metrics.mkdir()
    results = [{"step": step, "epoch": 1, **values} for step, values in (evaluations or {}).items()]
    (run.metrics / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    return run
