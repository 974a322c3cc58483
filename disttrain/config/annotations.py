"""What a field's annotation says beyond its type: bounds, unit, a function's form, whether a resume may change it.

Contract: everything a person reads about a field (`--help`, the reference page, error messages) is made
from the annotation and the docstring below the field, so that it is written down once.
"""

import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt
from pydantic import AllowInfNan, BaseModel, Strict
from pydantic.fields import FieldInfo

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
    Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
    OptimizerFactory = Callable[[Any], Optimizer]
    ScheduleFactory = Callable[[Any, int], LRScheduler]
    MetricFactory = Callable[[], Metric]
    Collate = Callable[[list[Any]], Any]
    PrecisionFactory = Callable[[torch.device], Any]
    Handler = Callable[[Any, Any], object]
else:  # pydantic only asks whether they can be called; torch stays unimported
    ModelFactory = DataFactory = Loss = Forward = OptimizerFactory = Callable[..., Any]
    ScheduleFactory = MetricFactory = Collate = Handler = PrecisionFactory = Callable[..., Any]

Integer = Annotated[int, Strict()]
Positive = Annotated[int, Strict(), Gt(0)]
NonNegative = Annotated[int, Strict(), Ge(0)]
PositiveFloat = Annotated[float, Strict(), Gt(0), AllowInfNan(False)]
NonNegativeFloat = Annotated[float, Strict(), Ge(0), AllowInfNan(False)]
AboveOne = Annotated[float, Strict(), Gt(1), AllowInfNan(False)]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True)
class About:
    """What a field says of itself that its type cannot.

    `takes` is the form of a function, such as "(optimizer, total_steps) -> LRScheduler"; `within` what holds
    the functions where there are several. `may_change`: a resumed run may have another value.
    """

    unit: str = ""
    may_change: bool = False
    takes: str = ""
    within: Literal["", "list of ", "dict of name: "] = ""

    @property
    def num_arguments(self) -> int:
        """With how many positional arguments the function is called."""
        inside = self.takes[1 : self.takes.index(")")] if self.takes else ""
        return len(inside.split(",")) if inside else 0


PLAIN_KEY = re.compile(r"[^.=\s]+")
"""What can be one part of a dotted name on the command line: a metric's name, a key of a dict."""


class Leaf(NamedTuple):
    """One field that holds a value: its dotted name and what it says of itself."""

    name: str
    info: FieldInfo
    about: About

    @property
    def type_text(self) -> str:
        """The type as a person reads it, such as `int > 0 | None`."""
        if not self.about.takes:
            return type_text(self.info.annotation, self.info.metadata)
        optional = " | None" if types.NoneType in get_args(self.info.annotation) else ""
        return self.about.within + self.about.takes + optional


def is_group(annotation: Any) -> bool:
    """Return whether a field of this type is a group of fields, such as `checkpoint`."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def leaves(model: type[BaseModel], prefix: str = "", parent: About | None = None) -> Iterator[Leaf]:
    """Yield the fields in the order of their declaration, those of groups by dotted name."""
    for name, info in model.model_fields.items():
        about = next((m for m in info.metadata if isinstance(m, About)), parent or About())
        if is_group(info.annotation):
            group: Any = info.annotation
            yield from leaves(group, f"{prefix}{name}.", about)
        else:
            yield Leaf(prefix + name, info, about)


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type with its bounds as a person reads it: `int > 0 | None`, `"ddp" | "fsdp"`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if takes := next((m.takes for m in arguments[1:] if isinstance(m, About)), ""):
            return takes
        return type_text(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(f'"{argument}"' for argument in arguments)
    if annotation is types.NoneType:
        return "None"
    bounds = [f" > {m.gt}" if isinstance(m, Gt) else f" >= {m.ge}" for m in metadata if isinstance(m, Gt | Ge)]
    return "".join([annotation.__name__, *bounds])


def alternatives(annotation: Any) -> list[Any]:
    """Return the plain types and Literals of a union, without their bounds: `int > 0 | None` gives [int, NoneType]."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [plain for argument in get_args(annotation) for plain in alternatives(argument)]
    return [annotation]
