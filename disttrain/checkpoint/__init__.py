"""WHAT survives: checkpoints that are complete and verified, or not there at all.

A checkpoint is a directory `step-00000040/`: tensors in safetensors, in a file of each rank that writes, everything
else in MANIFEST.json, hashes in SHA256SUMS, no pickle. `save` commits it by one rename after everything is flushed;
`load_newest` returns the newest one whose every byte is what was written, whole or cut for another number of ranks.
`DirectorySaver` and `DiskSaver` are save handlers for `disttrain.handlers.Checkpoint`.

The parts: `tree` (nested state to JSON and back), `sharded` (DTensors), `plan` (who writes what), `tensors` and
`stored` (safetensors files, written and read), `state_reader` (tensors out of several files), `manifest`, `check` (is
it what was written), `storage` (names and durable operations), `place` (`local` or `remote`), `write`, `read`,
`retention`, `listing`, `exports` (a model's tensors as one file), `background`, `jobs` and `staging` (writing while the
training goes on), `agree` (one outcome on every rank), `fingerprint`.
"""

from disttrain.checkpoint.agree import on_one_rank
from disttrain.checkpoint.background import AsynchronousSaver
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.disk_saver import DiskSaver, load_file
from disttrain.checkpoint.exports import Exported, export
from disttrain.checkpoint.fingerprint import params_sha256
from disttrain.checkpoint.listing import BestStep, Entry, best_in, best_of, inspect, plan_prune, survey, tensors_of
from disttrain.checkpoint.manifest import MANIFEST, About, FileRecord, Manifest
from disttrain.checkpoint.place import ELSEWHERE, Place, folder_under, folders_of, place_of
from disttrain.checkpoint.read import Loaded, load, load_newest, load_newest_of
from disttrain.checkpoint.remote import is_url
from disttrain.checkpoint.retention import rotate
from disttrain.checkpoint.storage import checkpoint_name, clean, committed, step_in, step_of
from disttrain.checkpoint.write import save

__all__ = [
    "ELSEWHERE",
    "MANIFEST",
    "About",
    "AsynchronousSaver",
    "BestStep",
    "DamagedError",
    "DirectorySaver",
    "DiskSaver",
    "Entry",
    "Exported",
    "FileRecord",
    "Loaded",
    "Manifest",
    "Place",
    "best_in",
    "best_of",
    "checkpoint_name",
    "clean",
    "committed",
    "export",
    "folder_under",
    "folders_of",
    "inspect",
    "is_url",
    "load",
    "load_file",
    "load_newest",
    "load_newest_of",
    "on_one_rank",
    "params_sha256",
    "place_of",
    "plan_prune",
    "rotate",
    "save",
    "step_in",
    "step_of",
    "survey",
    "tensors_of",
    "verify",
]
