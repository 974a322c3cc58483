"""WHAT survives: checkpoints that are complete and verified, or not there at all.

A checkpoint is a directory `step-00000040/`: tensors in safetensors, everything else in MANIFEST.json, hashes in
SHA256SUMS, no pickle. `save` commits it by one rename after everything is flushed; `load_newest` returns the
newest one whose every byte is what was written. `DirectorySaver` and `DiskSaver` are save handlers for
`disttrain.handlers.Checkpoint`.

The parts: `tree` (nested state to JSON and back), `tensors` (safetensors files), `manifest`, `storage` (names and
durable operations), `write`, `read`, `retention`, `agree` (one outcome on every rank), `fingerprint`.
"""

from disttrain.checkpoint.agree import on_one_rank
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.disk_saver import DiskSaver, load_file
from disttrain.checkpoint.fingerprint import params_sha256
from disttrain.checkpoint.listing import Entry, inspect, plan_prune, survey, tensors_of
from disttrain.checkpoint.manifest import MANIFEST, About, FileRecord, Manifest
from disttrain.checkpoint.read import Loaded, load, load_newest, verify
from disttrain.checkpoint.retention import rotate
from disttrain.checkpoint.storage import checkpoint_name, clean, committed, discard, step_of
from disttrain.checkpoint.write import save

__all__ = [
    "MANIFEST",
    "About",
    "DamagedError",
    "DirectorySaver",
    "DiskSaver",
    "Entry",
    "FileRecord",
    "Loaded",
    "Manifest",
    "checkpoint_name",
    "clean",
    "committed",
    "discard",
    "inspect",
    "load",
    "load_file",
    "load_newest",
    "on_one_rank",
    "params_sha256",
    "plan_prune",
    "rotate",
    "save",
    "step_of",
    "survey",
    "tensors_of",
    "verify",
]
