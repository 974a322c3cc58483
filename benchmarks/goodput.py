"""Simulates goodput: the share of the time of a job that it spends on steps that are kept.

This is a simulation, not a measurement. Failures come at random: each rank dies on average once in its mean time
between failures. Each failure costs the work since the last checkpoint, the time to notice it, and the time to restart.
Each checkpoint holds the training up for a while. The costs are options; give those that you have measured. For each
world size and mean time between failures it tries checkpoint periods around Young's and Daly's optimum, which serve as
a check, and marks the best period.

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
"""Mean times between failures of one rank. 419 failures in 54 days of 16,384 GPUs make 50,000 hours (Llama 3)."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, of the stall at a checkpoint, to notice a failure, and to restart the training."""

    step_s: float
    stall_s: float
    notice_s: float
    restart_s: float


def young(costs: Costs, mean_s: float) -> float:
    """Return the checkpoint period, in seconds, by Young's first-order formula (1974)."""
    return math.sqrt(2 * costs.stall_s * mean_s)


def daly(costs: Costs, mean_s: float) -> float:
    """Return the checkpoint period, in seconds, by Daly's higher-order formula (2006)."""
    if costs.stall_s >= 2 * mean_s:
        return mean_s
    x = costs.stall_s / (2 * mean_s)
    return math.sqrt(2 * costs.stall_s * mean_s) * (1 + math.sqrt(x) / 3 + x / 9) - costs.stall_s


def simulate(costs: Costs, mean_s: float, every_steps: int, wanted_s: float, seed: int = 0) -> float:
    """Return the share of wall-clock time spent on steps that were kept, over about `wanted_s` of such steps.

    A failure may come at any moment, also during a checkpoint (which then does not count) or during a restart.
    """
    generator = np.random.default_rng(seed)
    block_s = every_steps * costs.step_s
    cycle_s = block_s + costs.stall_s
    wall = kept = 0.0
    while kept < wanted_s:
        until_failure = generator.exponential(mean_s)
        cycles = int(until_failure // cycle_s)
        remaining_s = wanted_s - kept
        if cycles * block_s >= remaining_s:
            wall += math.ceil(remaining_s / block_s) * cycle_s
            kept += math.ceil(remaining_s / block_s) * block_s
            break
        kept += cycles * block_s
        wall += until_failure + costs.notice_s
        # A restart that fails begins again.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step-s", type=float, default=1.0)
    parser.add_argument("--stall-s", type=float, default=0.75)
    parser.add_argument("--notice-s", type=float, default=0.5)
    parser.add_argument("--restart-s", type=float, default=10.0)
    parser.add_argument("--hours", type=float, default=200.0)
    options = parser.parse_args()
    costs = Costs(options.step_s, options.stall_s, options.notice_s, options.restart_s)
    rows = study(costs, options.hours * HOUR)
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
    if options.json:
        options.json.write_text(json.dumps({"costs": asdict(costs), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
