"""The annotations of a Config's fields: types with bounds, units, forms of functions, changes allowed on resume.

*Contract*: all texts about a field (`--help`, the reference page, error messages) are made from its annotation and
from the docstring below it. So each fact about a field is written down once.
"""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic import AllowInfNan, BaseModel, BeforeValidator, Strict
from pydantic.fields import FieldInfo

from disttrain.devices import backend_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset
    from torchmetrics import Metric

    ModelFactory = Callable[[], nn.Module]
    DataFactory = Callable[[], Dataset[Any] | Iterable[Any]]
    Loss = Callable[[Any, Any], Tensor]
    Forward = Callable[[nn.Module, Any], Any]
    Weight = Callable[[Any], Any]
    LossOfEmbeddings = Callable[[Any], Tensor]
    OptimizerFactory = Callable[..., Optimizer]
    ParametersOf = Callable[[Any], Iterable[nn.Parameter]]
    ScheduleFactory = Callable[[Any, int], LRScheduler]
    MetricFactory = Callable[[], Metric]
    Collate = Callable[[list[Any]], Any]
    OrderFactory = Callable[[Any, int, int], Any]
    PrecisionFactory = Callable[[torch.device], Any]
    Handler = Callable[[Any, Any], object]
    BackendName = str
else:  # pydantic checks only that they are callable, so torch is not imported
    ModelFactory = DataFactory = Loss = Forward = OptimizerFactory = ParametersOf = Callable[..., Any]
    OrderFactory = LossOfEmbeddings = Callable[..., Any]
    Weight = ScheduleFactory = MetricFactory = Collate = Handler = PrecisionFactory = Callable[..., Any]
    BackendName = Literal[backend_names()]

Integer = Annotated[int, Strict()]
Positive = Annotated[int, Strict(), Gt(0)]
NonNegative = Annotated[int, Strict(), Ge(0)]
PositiveFloat = Annotated[float, Strict(), Gt(0), AllowInfNan(False)]
NonNegativeFloat = Annotated[float, Strict(), Ge(0), AllowInfNan(False)]
Fraction = Annotated[float, Strict(), Gt(0), Lt(1), AllowInfNan(False)]
AboveOne = Annotated[float, Strict(), Gt(1), AllowInfNan(False)]
Flag = Annotated[bool, Strict()]


def _class_names(value: Any) -> Any:
    """Return a choice of classes as a bool or a tuple of names and classes; "A, B" stands for both names."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if isinstance(value, type):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    for each in value:
        if not isinstance(each, type) and not (isinstance(each, str) and each.isidentifier()):
            raise ValueError("neither a class nor its name")
    return tuple(value) or False


Classes = Annotated[Flag | str | tuple[Any, ...], BeforeValidator(_class_names)]
"""Classes of modules, by themselves or by their names. True: a rule chooses them. False: none."""


@dataclass(frozen=True)
class FieldNote:
    """The facts about a field that its type cannot express.

    `may_change`: a resumed run may have another value. `harmless`: the field does not change the result of a step, so
    `disttrain compare` does not mention it. `takes`: the form of a function, such as
    "(optimizer, total_steps) -> LRScheduler". `within`: the container, if the field holds several functions. `asks`:
    the parts of the run that the function may ask for by the name of an argument (`config/asked.py`).
    """

    unit: str = ""
    may_change: bool = False
    harmless: bool = False
    takes: str = ""
    within: Literal["", "list of ", "dict of name: "] = ""
    asks: tuple[str, ...] = ()

    @property
    def num_arguments(self) -> int:
        """The number of positional arguments with which the function is called."""
        parameters = self.takes[1 : self.takes.index(")")] if self.takes else ""
        return len(parameters.split(",")) if parameters else 0


PLAIN_KEY = re.compile(r"[^.=\s]+")
"""The form of one part of a dotted name on the command line: a metric's name, a key of a dict."""


class Leaf(NamedTuple):
    """One field that holds a value: its dotted name, its declaration and its note."""

    name: str
    info: FieldInfo
    note: FieldNote

    @property
    def type_text(self) -> str:
        """The type in the form that people read, such as `int > 0 | None`."""
        if not self.note.takes:
            return type_text(self.info.annotation, self.info.metadata)
        forms = get_args(self.info.annotation)
        has_names = any(get_origin(form) is Mapping for form in forms)
        by_name = f" | dict of name: {self.note.takes}" if has_names else ""
        optional = " | None" if types.NoneType in forms else ""
        return self.note.within + self.note.takes + by_name * (not self.note.within) + optional


def is_group(annotation: Any) -> bool:
    """Return whether a field of this type is a group of fields, such as `checkpoint`."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def leaves(model: type[BaseModel], prefix: str = "", parent: FieldNote | None = None) -> Iterator[Leaf]:
    """Yield the fields in the order of their declaration; a field of a group has a dotted name."""
    for name, info in model.model_fields.items():
        note = next((item for item in info.metadata if isinstance(item, FieldNote)), parent or FieldNote())
        if is_group(info.annotation):
            group: Any = info.annotation
            yield from leaves(group, f"{prefix}{name}.", note)
        else:
            yield Leaf(prefix + name, info, note)


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type and its bounds in the form that people read: `int > 0 | None`, `"ddp" | "fsdp"`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if form := next((item.takes for item in arguments[1:] if isinstance(item, FieldNote)), ""):
            return form
        return type_text(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(f'"{argument}"' for argument in arguments)
    if annotation is types.NoneType:
        return "None"
    if origin is Mapping:
        return "dict"
    shown = {Gt: " > {0.gt}", Ge: " >= {0.ge}", Lt: " and < {0.lt}"}
    return "".join([annotation.__name__, *(shown[type(m)].format(m) for m in metadata if type(m) in shown)])


def alternatives(annotation: Any) -> list[Any]:
    """Return the types and Literals of a union, without bounds: `int > 0 | None` gives [int, NoneType]."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [plain for argument in get_args(annotation) for plain in alternatives(argument)]
    return [annotation]


def value_of(config: Any, name: str) -> Any:
    """Return the value of a field by its dotted name."""
    return reduce(getattr, name.split("."), config)
