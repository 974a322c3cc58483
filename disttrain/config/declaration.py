"""The base of a Config and of its groups of fields: frozen, typed, without unknown fields, with errors of our own.

*Errors*: ConfigError with one line for each problem, in the place of pydantic's ValidationError.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from disttrain.config.wording import explain_field_errors
from disttrain.errors import ConfigError


class _Hidden:
    """Hides pydantic's deprecated `BaseModel.validate`, so that a field can have that name."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError("validate")


class Declaration(BaseModel):
    """A frozen group of fields whose validation raises ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ignored_types=(_Hidden,))
    prefix: ClassVar[str] = ""

    if not TYPE_CHECKING:  # a type checker derives the constructor from the fields
        validate = _Hidden()

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(explain_field_errors(error, type(self), self.prefix)) from None
