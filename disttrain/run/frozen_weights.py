"""Frozen weights that checkpoints leave out, with `checkpoint.leave_out_frozen`: those that a run can build again.

*Contract*: a checkpoint leaves a parameter out if it has no `requires_grad` and still has the bits with which the run
was assembled (by the config's model, `init_from` and its handlers). Everything else is saved: buffers, a parameter that
was trained and then frozen, one that a forward or a handler moves. The position holds the hash of each that is left
out. A resumed run builds them again, and they must have these hashes.

*Errors*: ConfigError, the same on every rank and before any tensor is read, if a resumed run builds other ones.

*Cost*: the sha256 of the frozen weights when the run is assembled, and of this rank's part of them at each save: about
1 GB/s, and less than to save them. The hashes of the ledger would be faster, but miss some changes (all signs turned).
"""

import copy
import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.checkpoint import LEFT_OUT
from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.tensor_writer import little_endian_bytes
from disttrain.errors import ConfigError
from disttrain.handlers.stateful import bare
from disttrain.parallel import Layout
from disttrain.parallel.layout import part_here


class FrozenWeights:
    """The frozen parameters of the modules `parts`; `leaves_out`: whether checkpoints do without them."""

    def __init__(self, parts: Mapping[str, nn.Module], layout: Layout, backend: Backend, *, leaves_out: bool) -> None:
        self._parts = parts
        self._layout = layout
        self._backend = backend
        begin = self._frozen() if leaves_out else {}
        self._begin = {name: sha256_of(layout.whole(tensor)) for name, tensor in begin.items()}
        self._begin_here = _hashes_here(begin)
        self.left_out: dict[str, str] = {}
        """The hash of each parameter that the next checkpoint leaves out."""

    def _frozen(self) -> dict[str, Tensor]:
        return {name: each for name, each in self._named().items() if not each.requires_grad}

    def _named(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": parameter
            for part, module in self._parts.items()
            for name, parameter in bare(module).named_parameters(remove_duplicate=False)
        }

    def look(self) -> None:
        """Find out which parameters the next checkpoint leaves out; every rank calls this before each save."""
        if not self._begin:
            return
        frozen = {name: each for name, each in self._frozen().items() if name in self._begin}
        now = _hashes_here(frozen)
        moved = [name for name in frozen if now[name] != self._begin_here[name]]
        anywhere = set(chain.from_iterable(self._backend.all_gather(moved)))
        self.left_out = {name: self._begin[name] for name in frozen if name not in anywhere}

    def position(self) -> dict[str, Any]:
        """Return the entry of a checkpoint's position; empty if nothing is left out."""
        return {LEFT_OUT: self.left_out} if self.left_out else {}

    def lightened(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the modules among the `parts` of a checkpoint in a form whose state leaves them out."""
        return {name: Lightened(parts[name], name, self) for name in self._parts} if self._begin else {}

    def check(self, position: Mapping[str, Any]) -> None:
        """Raise ConfigError unless the parameters that a checkpoint leaves out are here, with the same bits."""
        expected = left_out_of(position)
        named = self._named()
        hashes = {name: sha256_of(self._layout.whole(named[name])) for name in expected if name in named}
        others = [name for name in expected if hashes.get(name) != expected[name]]
        with self._backend.agree("comparing the frozen weights"):
            if others:
                name = others[0]
                raise ConfigError(
                    f"the checkpoint leaves frozen weights out, and {name.removeprefix('model.')} is not the tensor "
                    f"with which the run began (sha256 {expected[name][:12]}), but {hashes.get(name, 'missing')[:12]}"
                    + (f", and so with {len(others) - 1} more" if others[1:] else "")
                    + ": the config's model, init_from and handlers must give the same weights; restore them, or start "
                    "anew with --fresh"
                )

    def completed(self, state: Mapping[str, Any], position: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's state with the present tensors in the place of those that it leaves out."""
        whole = dict(state)
        for part, module in self._parts.items():
            keys = [name.removeprefix(f"{part}.") for name in left_out_of(position) if name.startswith(f"{part}.")]
            if keys and part in whole:
                present = self._layout.stateful(module)
                values = bare(present).state_dict()
                whole[part] = copy.copy(whole[part])  # with the versions of its modules
                whole[part].update({key: values[key] for key in keys})
        return whole


class Lightened:
    """A module whose state leaves out what `frozen` says; it is only saved."""

    def __init__(self, part: Any, name: str, frozen: FrozenWeights) -> None:
        self._part = part
        self._name = name
        self._frozen = frozen

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state, of the same type as the whole one."""
        state = bare(self._part).state_dict()
        for key in [key for key in state if f"{self._name}.{key}" in self._frozen.left_out]:
            del state[key]
        return state  # type: ignore[no-any-return]


def left_out_of(position: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each parameter that a checkpoint leaves out, given its position."""
    found = position.get(LEFT_OUT)
    return {str(name): str(digest) for name, digest in found.items()} if isinstance(found, Mapping) else {}


def sha256_of(tensor: Tensor) -> str:
    """Return the sha256, in hex, of a line such as `float32 [3, 4]` and the values, row by row, little-endian."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(little_endian_bytes(tensor))
    return digest.hexdigest()


def _hashes_here(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: sha256_of(part_here(tensor)) for name, tensor in tensors.items()}
