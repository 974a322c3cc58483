"""Check that the parts of a run hold what their checkpoint holds, to the last bit.

*Contract*: after every restore the states of model, optimizer, precision, schedule and kept objects are read back and
compared with the states that were loaded: names, types, dtypes, shapes and values. A `load_state_dict` that rounds,
forgets or ignores something stops the run here, by the name of what differs, and not later by other bits. A part may
have more than the checkpoint: an option that a newer library added.

*Errors*: CheckpointError with the path, the saved and the restored value.

*Cost*: one pass over the state, and one copy of it to the host, at each resume.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disttrain.errors import CheckpointError
from disttrain.handlers.stateful import bare
from disttrain.parallel.layout import part_here


def check_restored(name: str, saved: Any, part: Any) -> None:
    """Raise CheckpointError unless the state of `part` is the saved one."""
    part = bare(part)  # a checkpoint holds the state of the model inside torch.compile
    difference = state_difference(saved, part.state_dict(), name)
    if difference is not None:
        path, expected, got = difference
        raise CheckpointError(
            f"{path} was not restored as it was saved: expected {expected}, got {got}. The load_state_dict of "
            f"{type(part).__name__} changes it, so the resumed run would have other bits; let it restore the value, "
            "or begin anew with --fresh"
        )


def state_difference(saved: Any, present: Any, path: str) -> tuple[str, str, str] | None:
    """Return (path, saved, present) of the first difference of two states; None if all that was saved is there."""
    if isinstance(saved, Tensor):
        return None if _same_bits(saved, present) else (path, _shown(saved, present), _shown(present, saved))
    if isinstance(saved, np.ndarray) and isinstance(present, np.ndarray):
        same_array = (saved.dtype, saved.shape, saved.tobytes()) == (present.dtype, present.shape, present.tobytes())
        return None if same_array else (path, f"array {saved.dtype} {saved.shape}", f"array {str(present)[:60]}")
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        for key, value in saved.items():
            if key not in present:
                return f"{path}.{key}", _shown(value), "nothing"
            if (difference := state_difference(value, present[key], f"{path}.{key}")) is not None:
                return difference
        return None
    if isinstance(saved, list | tuple) and isinstance(present, list | tuple) and len(saved) == len(present):
        differences = (
            state_difference(*pair, f"{path}.{i}") for i, pair in enumerate(zip(saved, present, strict=True))
        )
        return next((difference for difference in differences if difference is not None), None)
    same = type(saved) is type(present) and (
        saved == present or repr(saved) == repr(present)
    )  # nan is not equal to nan
    return None if same else (path, _shown(saved), _shown(present))


def _same_bits(saved: Tensor, present: Any) -> bool:
    if not isinstance(present, Tensor) or (saved.dtype, saved.shape) != (present.dtype, present.shape):
        return False
    if hasattr(saved, "to_local") != hasattr(present, "to_local"):
        return True  # of two layouts: the shapes and dtypes are all that can be compared without the other ranks
    left, right = _on_host(saved), _on_host(present)
    return left.shape == right.shape and torch.equal(left, right)


def _on_host(tensor: Tensor) -> Tensor:
    """Return the bytes of this rank's part of a tensor."""
    local = part_here(tensor)
    if local.layout != torch.strided:
        local = local.to_dense()
    return local.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _shown(value: Any, beside: Any = None) -> str:
    """Return a value as text; of a tensor its dtype and shape, and where those agree its first values."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {str(value)[:60]}"
    text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(beside, Tensor) and (beside.dtype, beside.shape) == (value.dtype, value.shape):
        text += f" {part_here(value).flatten()[:3].tolist()}..."
    return text
