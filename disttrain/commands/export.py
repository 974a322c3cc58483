"""`disttrain export RUN [DEST]`, the same as `disttrain checkpoint export`: the weights of a run for other programs.

*Contract*: no cfg.py runs and no model is built. Without DEST the name is made of the run's name and the step, in the
working directory. The form follows from the end of DEST's name unless --format says it.
"""

import argparse
import re
from pathlib import Path
from typing import get_args

from rich.console import Console

from disttrain.checkpoint import EXPORT_DTYPES, CheckpointStore, ExportForm, ExportWeights, export, step_in
from disttrain.commands.exit_codes import ALL_GOOD
from disttrain.errors import ConfigError
from disttrain.files import count_bytes

_ENDS = {"safetensors": ".safetensors", "torch": ".pt", "hf": ""}
_TORCH_ENDS = (".pt", ".pth", ".bin")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, beside those that choose a checkpoint."""
    add = parser.add_argument
    add("file", metavar="DEST", nargs="?", help="the new file or folder (default: NAME-STEP, here)")
    add(
        "--format",
        choices=get_args(ExportForm),
        help="safetensors: one file (default); hf: a folder for from_pretrained; torch: a file for torch.load (default "
        "if DEST ends in .pt, .pth or .bin)",
    )
    add(
        "--weights",
        choices=get_args(ExportWeights),
        default="evaluated",
        help="the weights that the run evaluated (default), that it trains, or their moving average",
    )
    add("--dtype", choices=EXPORT_DTYPES, help="convert all floating-point numbers (default: as they are)")
    add(
        "--max-shard-size",
        metavar="SIZE",
        type=_size_bytes,
        help="write several safetensors files with an index beyond this size, such as 2GB (default with hf: 5GB)",
    )
    add("--module", metavar="NAME", default="", help="export this module of the model alone, under its own names")


def export_model(root: CheckpointStore, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Write the weights of one checkpoint, by default the newest."""
    name = name or next(iter(root.committed()), None)
    if name is None:
        raise ConfigError(f"there are no checkpoints in {root}")
    form: ExportForm = options.format or ("torch" if str(options.file).endswith(_TORCH_ENDS) else "safetensors")
    if form == "torch" and options.max_shard_size is not None:
        raise ConfigError("--max-shard-size: expected --format safetensors or hf, got torch, which writes one file")
    file = options.file or f"{_name_of(options.run)}-{step_in(name)}{_ENDS[form]}"
    with root.opened(name) as directory:
        exported = export(
            directory,
            file,
            options.weights,
            form=form,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_size,
            module=options.module,
        )
    files = "" if exported.num_files == 1 else f" in {exported.num_files} files"
    content = f"{exported.num_tensors} tensors of step {exported.step}, {count_bytes(exported.size_bytes)}{files}"
    point = ", the parameters at the optimizer's evaluation point" if exported.evaluation_point else ""
    average = ", the moving average of the weights" if exported.average else ""
    without = f", without the {exported.num_left_out} frozen ones that the checkpoint leaves out"
    without *= bool(exported.num_left_out)
    console.print(f"wrote {file}: {content}{point}{average}{without}", soft_wrap=True)
    return ALL_GOOD


def _name_of(run: str) -> str:
    """Return a name for the files of an export: that of the run."""
    names = [part for part in Path(run).resolve().parts if part != "checkpoints" and not part.startswith("step-")]
    return names[-1]


def _size_bytes(text: str) -> int:
    """Return the bytes of a size such as "5GB", "200 MB" or "4GiB"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, 200MB or 4GiB, got {text}")
    return int(float(match[1]) * unit)
