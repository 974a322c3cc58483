"""Writes exported tensors: as one safetensors file, as several with an index, as a folder for transformers, by torch.

*Contract*: `described` has the tensors without values, and `fetch` returns those of one name after another. A file
appears whole and durable, or not at all; so does a folder. Of several files beside each other the index is written
last. Each function returns the names and sizes, in bytes, of the files with tensors.

*Source*: the layout of a sharded model, as `huggingface_hub.split_torch_state_dict_into_shards` and `from_pretrained`
have it: NAME-00001-of-00003.safetensors beside NAME.safetensors.index.json.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.storage import fsync_directory, replacing
from disttrain.checkpoint.tensor_writer import send_tensors
from disttrain.errors import CheckpointError
from disttrain.files import json_text, write_text

FetchByName = Callable[[str], Tensor]
"""name -> the values of that tensor, on the CPU"""
Files = list[tuple[str, int]]

SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
"""The end of the name of an index of several safetensors files, as the Hugging Face Hub has them."""
WEIGHTS_NAME = "model"


def write_one(file: Path, described: Mapping[str, Tensor], fetch: FetchByName) -> Files:
    """Write one safetensors file."""
    with replacing(file) as out:
        size_bytes, _ = send_tensors(out, described, fetch)
    return [(file.name, size_bytes)]


def write_torch(file: Path, described: Mapping[str, Tensor], fetch: FetchByName) -> Files:
    """Write a state_dict by `torch.save`; `fetch` returns one tensor for all names of a tie, in memory of its own."""
    state = {name: fetch(name) for name in described}
    with replacing(file) as out:
        torch.save(state, out)
        size_bytes = out.tell()
    return [(file.name, size_bytes)]


def write_in_shards(file: Path, described: Mapping[str, Tensor], fetch: FetchByName, max_bytes: int) -> Files:
    """Write NAME.safetensors; beyond `max_bytes` several files with an index, in the folder of `file`."""
    shards = shards_of(described, max_bytes)
    if len(shards) == 1:
        return write_one(file, described, fetch)
    name = file.name.removesuffix(SAFETENSORS)
    written: Files = []
    index = file.with_name(name + INDEX)
    try:
        by_tensor: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            shard = file.with_name(f"{name}-{number:05d}-of-{len(shards):05d}{SAFETENSORS}")
            if shard.exists() or index.exists():
                raise CheckpointError(f"{shard if shard.exists() else index} is there already; choose another name")
            written += write_one(shard, {each: described[each] for each in names}, fetch)
            by_tensor |= dict.fromkeys(names, shard.name)
        total = {
            "total_parameters": sum(each.numel() for each in described.values()),
            "total_size": sum(each.nbytes for each in described.values()),
        }
        content = {"metadata": total, "weight_map": {each: by_tensor[each] for each in described}}
        write_text(index, json_text(content, indent=2) + "\n")
    except BaseException:
        for shard_name, _ in written:
            file.with_name(shard_name).unlink(missing_ok=True)
        raise
    return written


def write_pretrained(
    folder: Path, described: Mapping[str, Tensor], fetch: FetchByName, description: Mapping[str, Any], max_bytes: int
) -> Files:
    """Write a folder that `from_pretrained` loads, given the description that a checkpoint keeps of the model."""
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        files = write_in_shards(temporary / f"{WEIGHTS_NAME}{SAFETENSORS}", described, fetch, max_bytes)
        dtypes = [dtype_name(each.dtype) for each in described.values() if each.is_floating_point()]
        config = {**description["config"], "architectures": [description["architecture"]]}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtypes[0] if dtypes else "float32"
        _write_json(temporary / "config.json", config)
        if (generation := description.get("generation_config")) is not None:
            _write_json(temporary / "generation_config.json", generation)
        fsync_directory(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(folder.parent)
    return files


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json_text(dict(sorted(content.items())), indent=2) + "\n")


def shards_of(described: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Return the names by file, in their order: a file holds at most `max_bytes`, or one tensor that is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in described.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
