"""What is kept as evidence of a run, and how two runs are compared."""

from disttrain.observe.compare import Comparison, Difference, compare_runs, first_difference, read_ledger
from disttrain.observe.hashes import batch_hash, state_tensors, tensor_hashes
from disttrain.observe.ledger import Ledger
from disttrain.observe.stragglers import Stragglers
from disttrain.observe.watchdog import Watchdog

__all__ = [
    "Comparison",
    "Difference",
    "Ledger",
    "Stragglers",
    "Watchdog",
    "batch_hash",
    "compare_runs",
    "first_difference",
    "read_ledger",
    "state_tensors",
    "tensor_hashes",
]
