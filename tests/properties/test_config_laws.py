"""Laws of the config: an override sets the value that was written, and JSON does not change a description."""

import json
from functools import partial
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from disttrain.config import Config, apply_overrides, blocking_differences, describe, differences


def model(
    count: int = 0,
    rate: float = 0.0,
    flag: bool = False,
    text: str = "",
    maybe: int | None = None,
    kind: Literal["a", "b"] = "a",
    several: tuple[Any, ...] = (),
    table: dict[str, Any] | None = None,
) -> None:
    raise AssertionError("overriding builds nothing")


def data() -> None:
    raise AssertionError("overriding builds nothing")


def optimizer(parameters: Any, lr: float = 0.1) -> None:
    raise AssertionError("overriding builds nothing")


CONFIG = Config(
    model=model,  # type: ignore[arg-type]
    train_data=data,  # type: ignore[arg-type]
    optimizer=optimizer,  # type: ignore[arg-type]
    loss=lambda y_pred, y: y_pred,
    global_batch_size=1,
    max_epochs=1,
)

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
finite = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
keywords = {
    "count": st.integers(),
    "rate": st.floats(allow_nan=False),
    "flag": st.booleans(),
    "text": st.text(),
    "maybe": st.none() | st.integers(),
    "kind": st.sampled_from(["a", "b"]),
    "several": st.lists(finite).map(tuple),
    "table": st.dictionaries(st.text(), finite),
}


def written(value: object) -> str:
    """Return the text of a value on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@given(st.fixed_dictionaries({}, optional=keywords))
def test_an_override_gives_back_what_was_written(values: dict[str, Any]) -> None:
    config: Any = apply_overrides(CONFIG, [f"model.{name}={written(value)}" for name, value in values.items()])
    assert getattr(config.model, "keywords", {}) == values
    assert [type(v) for v in getattr(config.model, "keywords", {}).values()] == [type(v) for v in values.values()]


@given(
    st.integers(),
    st.integers(1, 2**40),
    st.floats(0, exclude_min=True, allow_infinity=False) | st.none(),
    st.booleans(),
    st.integers(0),
)
def test_fields_give_back_what_was_written(seed: int, batch: int, norm: float | None, flag: bool, every: int) -> None:
    texts = [f"seed={seed}", f"global_batch_size={batch}", f"grad_clip_norm={written(norm)}"]
    texts += [f"compile={written(flag)}", f"checkpoint.every_steps={every}"]
    config = apply_overrides(CONFIG, texts)
    assert (config.seed, config.global_batch_size, config.grad_clip_norm) == (seed, batch, norm)
    assert (config.compile, config.checkpoint.every_steps) == (flag, every)


@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner)))
def test_a_description_is_the_same_after_json(value: Any) -> None:
    config = CONFIG.model_copy(update={"train_data": partial(data, root=value)})
    description = describe(config)
    again = json.loads(json.dumps(description, allow_nan=False))
    assert again == description
    assert differences(again, description) == blocking_differences(description, again) == []
