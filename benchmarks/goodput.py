"""Of the time that a job holds its machines, how much is spent on steps that are kept?

A simulation, not a measurement: failures come at random (each rank dies on average once in its mean time between
failures), each costs the work since the last checkpoint, the time to notice, and the time to start again; each
checkpoint holds the training up for a while. The costs are given, and should be those that were measured. For each
world size and mean time between failures it tries periods of checkpoints around Young's and Daly's optimum, which serve
as a check, and marks the best.

    python benchmarks/goodput.py [--json FILE] [--stall-s 0.05] [--restart-s 5] [--hours 2000]
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

HOUR = 3600.0
WORLDS = (8, 64, 512, 4096)
MTBF_HOURS = (1_000.0, 10_000.0, 50_000.0)
"""Of one rank. 50,000 hours is what 419 failures in 54 days of 16,384 GPUs come to (Llama 3)."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step, that a checkpoint holds the training up, to notice a failure, to be training again."""

    step_s: float
    stall_s: float
    notice_s: float
    restart_s: float


def young(costs: Costs, mean_s: float) -> float:
    """Return the period of checkpoints, in seconds, that Young's first-order formula gives (1974)."""
    return math.sqrt(2 * costs.stall_s * mean_s)


def daly(costs: Costs, mean_s: float) -> float:
    """Return the period that Daly's higher-order formula gives (2006)."""
    if costs.stall_s >= 2 * mean_s:
        return mean_s
    x = costs.stall_s / (2 * mean_s)
    return math.sqrt(2 * costs.stall_s * mean_s) * (1 + math.sqrt(x) / 3 + x / 9) - costs.stall_s


def simulate(costs: Costs, mean_s: float, every_steps: int, wanted_s: float, seed: int = 0) -> float:
    """Return the share of wall-clock time spent on steps that were kept, over about `wanted_s` of such steps.

    Failures strike at any moment, also while a checkpoint is made (it then does not count) or a restart is under way.
    """
    generator = np.random.default_rng(seed)
    block_s = every_steps * costs.step_s
    cycle_s = block_s + costs.stall_s
    wall = kept = 0.0
    while kept < wanted_s:
        until_failure = generator.exponential(mean_s)
        cycles = int(until_failure // cycle_s)
        left = wanted_s - kept
        if cycles * block_s >= left:
            wall += math.ceil(left / block_s) * cycle_s
            kept += math.ceil(left / block_s) * block_s
            break
        kept += cycles * block_s
        wall += until_failure + costs.notice_s
        # A restart that fails is begun again.
        while (next_failure := generator.exponential(mean_s)) < costs.restart_s:
            wall += next_failure + costs.notice_s
        wall += costs.restart_s
    return kept / wall


def study(costs: Costs, wanted_s: float) -> list[dict[str, float]]:
    """Return a row for each world size, mean time between failures and period."""
    rows = []
    for world in WORLDS:
        for hours in MTBF_HOURS:
            mean_s = hours * HOUR / world
            best = young(costs, mean_s)
            group = []
            for factor in FACTORS:
                every_steps = max(1, round(factor * best / costs.step_s))
                share = simulate(costs, mean_s, every_steps, max(wanted_s, 300 * mean_s))
                group.append(
                    {
                        "world_size": world,
                        "rank_mtbf_hours": hours,
                        "job_mtbf_s": mean_s,
                        "every_steps": every_steps,
                        "goodput": share,
                        "young_s": best,
                        "daly_s": daly(costs, mean_s),
                    }
                )
            top = max(row["goodput"] for row in group)
            rows += [{**row, "best": row["goodput"] == top} for row in group]
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    options.add_argument("--step-s", type=float, default=1.0)
    options.add_argument("--stall-s", type=float, default=0.75)
    options.add_argument("--notice-s", type=float, default=0.5)
    options.add_argument("--restart-s", type=float, default=10.0)
    options.add_argument("--hours", type=float, default=200.0)
    given = options.parse_args()
    costs = Costs(given.step_s, given.stall_s, given.notice_s, given.restart_s)
    rows = study(costs, given.hours * HOUR)
    table = Table(
        "ranks", "rank fails each", "job fails each", *(f"{factor} x Young" for factor in FACTORS), "Young", "Daly"
    )
    for i in range(0, len(rows), len(FACTORS)):
        group = rows[i : i + len(FACTORS)]
        shares = [
            f"{'*' if row['best'] else ' '}{row['goodput']:.2%} ({row['every_steps']:,.0f} steps)" for row in group
        ]
        first = group[0]
        table.add_row(
            f"{first['world_size']:,.0f}",
            f"{first['rank_mtbf_hours']:,.0f} h",
            f"{first['job_mtbf_s'] / HOUR:,.2f} h",
            *shares,
            f"{first['young_s']:,.0f} s",
            f"{first['daly_s']:,.0f} s",
        )
    Console(width=170).print(table)
    if given.json:
        given.json.write_text(json.dumps({"costs": asdict(costs), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
