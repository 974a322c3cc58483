"""Evidence that two runs are the same: the results of every step, their hashes, and the comparison of two ledgers.

ledger       writes one line a step: order of the samples, loss, gradient norm, hashes of the batch and the state
hashes       the hash of a tensor, of a batch, of a whole state
samples      the hash of one sample of a dataset
fingerprint  the SHA-256 of a model's weights, for result.json
reading      reads a ledger back
compare      finds the first difference of two ledgers and its likely cause
module_outputs  the output of every module of a step, as a hash
evaluations  puts the curves of training and evaluations beside the lines of a ledger
"""

from disttrain.evidence.compare import Comparison, LedgerDifference, first_difference
from disttrain.evidence.evaluations import with_evaluations, with_values, without_rounding
from disttrain.evidence.fingerprint import params_sha256
from disttrain.evidence.hashes import batch_hash, state_tensors, tensor_hashes
from disttrain.evidence.ledger import Ledger
from disttrain.evidence.reading import read_ledger
from disttrain.evidence.samples import sample_hash

__all__ = [
    "Comparison",
    "Ledger",
    "LedgerDifference",
    "batch_hash",
    "first_difference",
    "params_sha256",
    "read_ledger",
    "sample_hash",
    "state_tensors",
    "tensor_hashes",
    "with_evaluations",
    "with_values",
    "without_rounding",
]
