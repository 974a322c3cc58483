"""The weights with which a new run begins, `init_from`: taken into the model after its strategy has spread it.

*Contract*: every rank reads the same weights and takes them into the model, the loss and the forward, by the names of
their state_dicts; those of a loss are `loss.NAME`. Of a tensor that is cut over the ranks each rank reads its own part.
Values of another dtype of the same kind are converted. A tensor with several names needs one of them. A resumed run
takes nothing: its checkpoint wins. Only if its checkpoint leaves frozen weights out, these are taken again.

*Errors*: ConfigError, the same on one rank as on many, if nothing fits; with `strict` also for a name that is missing
or has another shape and is not listed in `skip`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.checkpoint import Weights
from disttrain.checkpoint.dtensors import MeshPlacements
from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.weights import Chosen
from disttrain.config import InitFromConfig
from disttrain.engine.supervised import StepFunction
from disttrain.errors import ConfigError
from disttrain.evidence.ledger import shortened
from disttrain.handlers.stateful import bare
from disttrain.parallel import Layout
from disttrain.parallel.layout import part_here
from disttrain.run.factories import build
from disttrain.run.frozen_weights import left_out_of, sha256_of
from disttrain.run.weight_names import NamePairs, pair_names, renaming_that_fits
from disttrain.run.weight_source import Begin, Source, read_source

_SHOWN = 4


@dataclass(frozen=True)
class Taken:
    """The origin of the weights that were taken, and the names by what became of them."""

    begin: Begin
    taken: list[str]
    """Names of this model that were found; those below were not taken."""
    skipped: list[str]
    missing: list[str]
    """Names of this model that the source does not hold."""
    misfits: list[str]
    """Names of this model that have another shape or kind there, with both."""
    left_over: list[str]
    """Names of the source that nothing takes."""
    absent: list[str] = field(default_factory=list)
    """Modules beside the model, such as the loss, of which the source holds nothing."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the source."""

    def text(self) -> str:
        """Return the report in one line."""
        step = "" if self.begin.step is None else f", step {self.begin.step}"
        parts = [f"begins with {self.begin.path}{step}: {_counted(self.taken)} taken"]
        for words, names in (
            ("as the model builds them (init_from.skip)", self.skipped),
            ("not found", self.missing),
            ("of another shape", self.misfits),
            ("left over there", self.left_over),
        ):
            parts += [f"{len(names)} {words}: {shortened(names, _SHOWN)}"] if names else []
        parts += [f"the {part}, which is not there, begins as the config makes it" for part in self.absent]
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return everything as plain values, for `init_from.json`."""
        return {**self.begin._asdict(), **{k: v for k, v in asdict(self).items() if k not in ("begin", "notes")}}


@dataclass(frozen=True)
class LeftOut:
    """A frozen tensor that the source's checkpoint leaves out: it fits if the tensor here has this hash already."""

    digest: str


@dataclass(frozen=True)
class _Pairing:
    """The names of this model as they belong to those of the source, and what is to be read there."""

    pairs: NamePairs
    taken: dict[str, str]
    """The stored name for each name of this model that is taken."""
    missing: list[str]
    misfits: dict[str, str]
    chosen: Chosen
    states: dict[str, dict[str, Any]]
    """The states of the modules here, with their own tensors."""


class InitialWeights:
    """The weights that `init_from` asks for.

    `before`: those with which this run has begun before, if it has. `resumes`: it needs them for what its checkpoints
    leave out.
    """

    def __init__(self, wanted: InitFromConfig, before: Begin | None = None, *, resumes: bool = False) -> None:
        assert wanted.path is not None
        self._path = wanted.path
        self._wanted = wanted
        self._before = before
        self._resumes = resumes

    def take(self, step_function: StepFunction, backend: Backend, layout: Layout | None = None) -> Taken:
        """Read the weights and take them into the modules of `step_function`; every rank calls this.

        `layout`: that of the modules, if they have been spread over the ranks: each rank then reads its parts alone.
        """
        modules = modules_of(step_function)
        pairing: _Pairing | None = None

        def choose(contents: Weights) -> Chosen:
            nonlocal pairing
            hashes = _hashes_of_left_out(contents, modules, layout)
            with backend.agree("pairing the weights of init_from"):
                pairing = self._pair(modules, contents, hashes)
            return pairing.chosen

        try:
            source = read_source(self._path, self._before, list(modules), backend, choose)
        except ConfigError as error:
            if not self._resumes or pairing is not None:
                raise
            raise ConfigError(
                f"{error}. The run's checkpoints leave frozen weights out, which come from there: restore it, or name "
                "the place where it is now by init_from"
            ) from error
        assert pairing is not None
        with backend.agree("taking the weights of init_from"):
            return self._taken(modules, source, pairing)

    def _pair(self, modules: Mapping[str, nn.Module], contents: Weights, hashes: Mapping[str, str]) -> "_Pairing":
        """Pair the names here with the contents of the source, which are the same on every rank."""
        stored = {**_left_out_there(contents), **by_name(contents.modules)}
        states = {name: bare(module).state_dict(keep_vars=True) for name, module in modules.items()}
        present = by_name(states)
        # A file holds a model alone: a loss with a state is then no one's fault.
        wanted = [name for part in states for name in by_name({part: states[part]}) if part in contents.modules]
        pairs = pair_names(stored, wanted, self._wanted.rename, self._wanted.skip)
        kinds = {here: _misfit(stored[there], present[here], hashes.get(here)) for here, there in pairs.taken.items()}
        misfits = {name: text for name, text in kinds.items() if text}
        taken = {here: there for here, there in pairs.taken.items() if here not in misfits}
        filled = {id(present[name]) for name in taken}
        missing = [name for name in pairs.missing if id(present[name]) not in filled]
        self._check(pairs, taken, missing, misfits, stored)
        keys = {
            name: (part, key)
            for part, state in contents.modules.items()
            for key, name in _names_of(part, state).items()
        }
        chosen: dict[str, dict[str, Any]] = {part: {} for part in contents.modules}
        for here, there in taken.items():
            if there in keys:  # not what is left out there, and is here already
                part, key = keys[there]
                chosen[part][key] = _spread_of(present[here])
        return _Pairing(pairs, taken, missing, misfits, chosen, states)

    def _taken(self, modules: Mapping[str, nn.Module], source: Source, pairing: "_Pairing") -> Taken:
        """Load what was read into the modules, and return the report."""
        read, pairs = by_name(source.weights.modules), pairing.pairs
        values = {here: read[there] for here, there in pairing.taken.items() if there in read}
        self._check_ties(values, by_name(pairing.states))
        for part, module in modules.items():
            own = {key: values[name] for key, name in _names_of(part, pairing.states[part]).items() if name in values}
            if own:
                build(f"init_from: load_state_dict of the {part}", bare(module).load_state_dict, own, False)
        texts = [f"{name} {text}" for name, text in pairing.misfits.items()]
        absent = [part for part in modules if part not in pairing.chosen]
        taken = list(pairing.taken)
        return Taken(source.begin, taken, pairs.skipped, pairing.missing, texts, pairs.left_over, absent, source.notes)

    def _check(
        self,
        pairs: NamePairs,
        taken: Mapping[str, Any],
        missing: Sequence[str],
        misfits: Mapping[str, str],
        stored: Mapping[str, Any],
    ) -> None:
        if taken and not (self._wanted.strict and (missing or misfits)):
            return
        holds = shortened(list(stored), _SHOWN) or "no tensors"
        problems = [] if taken else [f"nothing that fits: it holds {holds}"]
        problems += [f"no {shortened(missing, _SHOWN)}"] if missing else []
        problems += [f"{name} {text}" for name, text in list(misfits.items())[:_SHOWN]]
        names = [*missing, *misfits]
        fitting = renaming_that_fits(missing, pairs.left_over)
        fitting = None if fitting is not None and taken and "" in fitting.rename else fitting  # it would move those too
        found = "" if fitting is None or fitting.num_found == len(missing) else f", which finds {fitting.num_found}"
        advice = (
            "map other names by init_from.rename"
            if fitting is None
            else f"map the names by init_from.rename={fitting.rename}{found}"
        )
        raise ConfigError(
            f"init_from={self._path}: expected the weights of this model, got {'; '.join(problems)}; {advice}"
            + (f", list what the model is to begin itself, such as init_from.skip={names[0]}" if taken else "")
            + (", or take what fits by init_from.strict=false" if taken else "")
        )

    def _check_ties(self, taken: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        """Raise ConfigError if two names of one tensor would get different values: the later would silently win."""
        first: dict[int, str] = {}
        for name, value in taken.items():
            other = first.setdefault(id(present[name]), name)
            values = value, taken[other]
            if (
                other != name
                and all(isinstance(each, Tensor) for each in values)
                and not torch.equal(*map(part_here, values))
            ):
                raise ConfigError(
                    f"init_from={self._path}: {other} and {name} are one tensor in this model, but differ there; take "
                    f"one of them: init_from.skip={name}"
                )


def modules_of(step_function: StepFunction) -> dict[str, nn.Module]:
    """Return the modules of a step function that have a state, by name: the model, and a loss or a forward."""
    parts = dict(step_function.named_children())
    return {name: part for name, part in parts.items() if name == "model" or part.state_dict()}


def _names_of(part: str, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each key of a module's state: those of the model as they are, others after their module."""
    return {key: key if part == "model" else f"{part}.{key}" for key in state}


def by_name(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of the states of modules, by their names."""
    return {name: states[part][key] for part in states for key, name in _names_of(part, states[part]).items()}


def _left_out_there(contents: Weights) -> dict[str, LeftOut]:
    manifest = contents.manifest
    left_out = {} if manifest is None else left_out_of(manifest.position)
    return {name.removeprefix("model."): LeftOut(digest) for name, digest in left_out.items()}


def _hashes_of_left_out(contents: Weights, modules: Mapping[str, nn.Module], layout: Layout | None) -> dict[str, str]:
    """Return the sha256 of all tensors here, which may be cut, if the source leaves any out; every rank calls this."""
    if not _left_out_there(contents):
        return {}
    states = by_name({name: bare(module).state_dict(keep_vars=True) for name, module in modules.items()})
    tensors = {name: each for name, each in states.items() if isinstance(each, Tensor)}
    return {name: sha256_of(each if layout is None else layout.whole(each)) for name, each in tensors.items()}


def _spread_of(tensor: Any) -> MeshPlacements | None:
    """Return the mesh and the placements of a tensor that is cut over the ranks; None for a whole one."""
    return (tensor.device_mesh, tensor.placements) if hasattr(tensor, "placements") else None


def _misfit(there: Any, here: Any, sha256: str | None) -> str:
    """Return the reason why a stored value does not fit the value `here`, of that hash; empty if it does."""
    if isinstance(there, LeftOut):
        return "" if sha256 == there.digest else "is frozen there and not in its checkpoint, and another tensor here"
    if not (isinstance(there, Tensor) and isinstance(here, Tensor)):
        kinds = ["a tensor" if isinstance(value, Tensor) else "no tensor" for value in (there, here)]
        return "" if kinds[0] == kinds[1] else f"is {kinds[0]} there and {kinds[1]} here"
    if there.shape != here.shape:
        return f"is {list(there.shape)} there and {list(here.shape)} here"
    if _kind(there) != _kind(here):
        return f"is {dtype_name(there.dtype)} there and {dtype_name(here.dtype)} here"
    return ""


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"
