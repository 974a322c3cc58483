"""A minute of hypothesis against the readers of a checkpoint: `python tests/soak/fuzz.py [--seconds 60] [--seed 0]`.

Any error but a CheckpointError is a finding: hypothesis shrinks and prints it, and the program ends with 1.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

from checkpoint_strangers import ATTACKS, ATTACKS_ON_TWO, attack, victim, victim_in_two

EXAMPLES_PER_TURN = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    end = time.monotonic() + options.seconds
    number = options.seed
    with tempfile.TemporaryDirectory(prefix="disttrain-fuzz-") as folder:
        one, two = victim(Path(folder) / "one"), victim_in_two(Path(folder) / "two")
        while time.monotonic() < end:
            for how, attacked in [(how, one) for how in ATTACKS] + [(how, two) for how in ATTACKS_ON_TWO]:

                @seed(number)
                @settings(
                    max_examples=EXAMPLES_PER_TURN,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(data=st.data())
                def once(data: st.DataObject) -> None:
                    # It is called before the loop goes on, so B023 does not apply.
                    counts[f"{how.__name__}, {'one file' if attacked == one else 'two files'}"] += 1  # noqa: B023
                    attack(attacked, how, data.draw)  # noqa: B023

                once()
            number += 1
    print(f"fuzz: seeds {options.seed} to {number - 1}, {options.seconds:.0f} s, only clean errors")
    for name, count in sorted(counts.items()):
        print(f"  {name:31} {count:7,} checkpoints")
    return 0


if __name__ == "__main__":
    sys.exit(main())
