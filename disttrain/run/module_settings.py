"""Settings of modules that handlers may change under way: plain attributes such as `Dropout.p`.

*Contract*: no `state_dict` holds them. A checkpoint's position holds those that differ from when the run was assembled,
and a resumed run sets them again. Plain attributes are numbers, texts, True, False and None. The mode (`training`) is
left out, because each step sets it.

*Errors*: CheckpointError for settings that no run of this model wrote.

*Cost*: one pass over the attributes of all modules at each save.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from disttrain.errors import CheckpointError

OF_TORCH = ("training", "_is_full_backward_hook", "call_super_init", "dump_patches")

Key = tuple[str, str]
"""(path of a module, attribute)."""


class ModuleSettings:
    """The settings of `module` and of all modules inside."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._at_start = dict(self._now())

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from those at the start, as "PATH:ATTRIBUTE"; JSON can hold them."""
        return {
            ":".join(key): {"float": value.hex()} if isinstance(value, float) else value
            for key, value in self._now()
            if key not in self._at_start or not _same(self._at_start[key], value)
        }

    def load(self, changed: Any) -> None:
        """Set what `changed` returned when the checkpoint was saved; CheckpointError for what no run wrote."""
        try:
            for name, value in changed.items():
                self._set(name, float.fromhex(value["float"]) if isinstance(value, Mapping) else value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's position has module_settings={str(changed)[:60]}, which no run of this model wrote "
                f"({error}); use another checkpoint, or start anew with --fresh"
            ) from error

    def _set(self, name: str, value: Any) -> None:
        path, _, attribute = name.rpartition(":")
        module = self._module.get_submodule(path)
        if not _is_plain(value) or not _is_plain(getattr(module, attribute, None)):
            raise ValueError(f"{name} is no plain attribute")
        setattr(module, attribute, value)

    def _now(self) -> Iterator[tuple[Key, Any]]:
        for path, module in self._module.named_modules():
            for attribute, value in vars(module).items():
                if _is_plain(value) and attribute not in OF_TORCH:
                    yield (path, attribute), value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    """Return whether two plain values are the same to the last bit; nan is the same as nan."""
    return type(one) is type(other) and repr(one) == repr(other)
