"""WHAT survives a kill: checkpoints, each of which is complete and verified, or is not there at all.

A checkpoint is a directory `step-00000040/`. It has one safetensors file for each rank that wrote a part. MANIFEST.json
holds everything else, and SHA256SUMS holds the hashes. No file is a pickle. `save` flushes every file and then commits
the checkpoint by one rename. `load_newest` returns the newest checkpoint whose bytes are all as they were written, on
any number of ranks. `DirectorySaver` and `DiskSaver` are save handlers for `disttrain.handlers.Checkpoint`.

    write            saves a state: each rank writes its part, rank 0 commits
    read             loads the newest good checkpoint, with the same result on every rank
    plan             decides which rank writes which tensors
    directory_saver  the save handler that writes checkpoint directories
    background       the same save handler, writing while the training continues
    jobs             one save under way in the background: its thread, and the notes between the ranks' threads
    staging          the copy of a state that is written in the background
    disk_saver       the save handler that writes single files by `torch.save`
    state_tree       nested state to JSON and named tensors, and back
    dtensors         the part of a DTensor that this rank holds, and a DTensor made from such a part
    tensor_writer    writes a safetensors file and hashes it on the way
    tensor_reader    reads any box of any tensor from a safetensors file
    state_reader     reads the tensors of a checkpoint from all its files, whole or only this rank's part
    manifest         MANIFEST.json and SHA256SUMS
    check            verifies that a checkpoint has the bytes that were written
    store            the protocol of a store, the store that a path or URL means, and the removal of old checkpoints
    local_store      a store in a directory
    remote_store     a store behind a URL, through fsspec
    guarded_store    a store that is changed only while a guard allows it
    storage          the names in such a directory, and durable operations on files
    listing          lists the checkpoints of a store, and plans which of them to remove
    weights          reads the weights of modules from a checkpoint of any run, or from files
    weight_files     opens files of weights, of which each rank reads its part
    exports          chooses the tensors of a model in a checkpoint, and writes them in a form for other programs
    export_files     the files of an export: safetensors in one file or several, a folder for transformers, torch.save
    agree            one outcome for all ranks

| noun     | meaning                                                                                              |
|----------|------------------------------------------------------------------------------------------------------|
| store    | a directory, or a prefix of an object store, that holds the checkpoints of a run                     |
| upload   | the name of a save that has begun and is not committed: a temporary directory, or a prefix           |
| part     | one file of tensors of an upload; one rank writes it                                                 |
| share    | the tensors that one rank writes, together with the table of the whole state                         |
| table    | the file, or the chunks, of every tensor; format 2 of the manifest has it                            |
| chunk    | the piece of a cut tensor that one file holds: a start and a length along one dimension              |
| note     | a small file in which the thread of a rank reports that its part is written, or why it is not        |
| leftover | a save or a removal that a kill cut off: it is never read, and the next run removes it               |
| aside    | set aside because it is damaged: renamed or marked, never read, and never removed by a run           |
"""

from disttrain.checkpoint.agree import on_one_rank
from disttrain.checkpoint.background import AsynchronousSaver
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.disk_saver import DiskSaver, load_file
from disttrain.checkpoint.exports import (
    EVALUATION_POINT,
    EXPORT_DTYPES,
    LEFT_OUT,
    PRETRAINED,
    Exported,
    ExportForm,
    ExportWeights,
    export,
)
from disttrain.checkpoint.listing import (
    BestStep,
    ListedCheckpoint,
    best_in,
    best_of,
    inspect,
    is_anchor,
    plan_prune,
    survey,
    tensors_of,
)
from disttrain.checkpoint.manifest import MANIFEST, CheckpointInfo, FileRecord, Manifest
from disttrain.checkpoint.read import Loaded, load, load_from, load_newest, load_newest_of
from disttrain.checkpoint.remote_store import is_url
from disttrain.checkpoint.storage import checkpoint_name, clean, committed, step_in, step_of
from disttrain.checkpoint.store import (
    ELSEWHERE,
    CheckpointStore,
    folder_under,
    folders_of,
    marked_place,
    rotate,
    store_at,
)
from disttrain.checkpoint.weights import Weights, weights_of_checkpoint, weights_of_file
from disttrain.checkpoint.write import save
from disttrain.errors import DamagedError

__all__ = [
    "ELSEWHERE",
    "EVALUATION_POINT",
    "EXPORT_DTYPES",
    "LEFT_OUT",
    "MANIFEST",
    "PRETRAINED",
    "AsynchronousSaver",
    "BestStep",
    "CheckpointInfo",
    "CheckpointStore",
    "DamagedError",
    "DirectorySaver",
    "DiskSaver",
    "ExportForm",
    "ExportWeights",
    "Exported",
    "FileRecord",
    "ListedCheckpoint",
    "Loaded",
    "Manifest",
    "Weights",
    "best_in",
    "best_of",
    "checkpoint_name",
    "clean",
    "committed",
    "export",
    "folder_under",
    "folders_of",
    "inspect",
    "is_anchor",
    "is_url",
    "load",
    "load_file",
    "load_from",
    "load_newest",
    "load_newest_of",
    "marked_place",
    "on_one_rank",
    "plan_prune",
    "rotate",
    "save",
    "step_in",
    "step_of",
    "store_at",
    "survey",
    "tensors_of",
    "verify",
    "weights_of_checkpoint",
    "weights_of_file",
]
