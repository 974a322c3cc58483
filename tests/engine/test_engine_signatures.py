"""The checks of a callable's signature agree with the outcome of a call."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine.signatures import call_error, check_takes_two, signature_of, takes_engine


@st.composite
def functions(draw: Any) -> Callable[..., Any]:
    """Draw a function that does nothing, with any kinds of parameters; keyword-only ones are named a and b."""
    required, optional = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    parameters = [f"p{i}" for i in range(required)] + [f"q{i}=0" for i in range(optional)]
    parameters.append("*args" if draw(st.booleans()) else "*")
    parameters += [f"{name}{draw(st.sampled_from(['', '=0']))}" for name in draw(st.sets(st.sampled_from("ab")))]
    if parameters[-1] == "*":
        parameters.pop()
    if draw(st.booleans()):
        parameters.append("**kwargs")
    function: Callable[..., Any] = eval(f"lambda {', '.join(parameters)}: None")  # noqa: S307
    return function


positional = st.lists(st.integers(), max_size=4)
keywords = st.dictionaries(st.sampled_from("abp"), st.integers(), max_size=2)


def works(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        function(*args, **kwargs)
    except TypeError:
        return False
    return True


@given(functions(), positional, keywords)
def test_there_is_a_call_error_exactly_when_the_call_fails(
    function: Callable[..., Any], args: list[int], kwargs: dict[str, int]
) -> None:
    error = call_error(signature_of(function, "function"), args, kwargs)
    assert (error is None) == works(function, *args, **kwargs)


@given(functions(), positional, keywords, st.booleans(), st.booleans())
def test_a_handler_takes_the_engine_if_a_call_with_it_works_and_none_if_one_without_it_does(
    handler: Callable[..., Any], args: list[int], kwargs: dict[str, int], adds_exception: bool, adds_b: bool
) -> None:
    by_position, by_keyword = ["exception"] * adds_exception, ["b"] * adds_b
    added = [object()] * adds_exception
    named = {**kwargs, **dict.fromkeys(by_keyword)}
    clashes = adds_b and "b" in kwargs

    def answer() -> bool:
        return takes_engine(handler, "EVENT", (by_position, by_keyword), args, kwargs)

    if works(handler, "engine", *added, *args, **named) and not clashes:
        assert answer() is True
    elif works(handler, *added, *args, **named) and not clashes:
        assert answer() is False
    else:
        with pytest.raises(ValueError, match=r"EVENT calls its handlers with \(\[engine\]"):
            answer()


@given(functions())
def test_two_arguments_are_taken_exactly_when_a_call_with_two_works(function: Callable[..., Any]) -> None:
    if works(function, 1, 2):
        check_takes_two(function, "process_function", "the engine and the batch")
    else:
        with pytest.raises(ValueError, match="process_function must take two arguments, the engine and the batch; "):
            check_takes_two(function, "process_function", "the engine and the batch")


def test_an_argument_that_the_event_itself_passes_is_named() -> None:
    with pytest.raises(ValueError, match="EVENT itself passes iter_counter"):
        takes_engine(lambda engine, iter_counter: None, "EVENT", ([], ["iter_counter"]), [], {"iter_counter": 3})


@pytest.mark.parametrize("value", [None, 3, "text"])
def test_a_value_that_cannot_be_called_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a handler must be callable, got"):
        signature_of(value, "a handler")


def test_a_builtin_without_a_signature_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"a handler must have a signature, got .*dict.*; wrap it in a function"):
        signature_of(dict, "a handler")
