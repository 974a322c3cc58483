"""`key=value` sets the field or keyword of that name, as a value of its type, and builds nothing."""

from functools import partial
from typing import Any

import pytest
from config_samples import adam, net, sample
from torch import nn

from disttrain.config import apply_overrides, settable
from disttrain.errors import ConfigError


def overridden(*overrides: str, **changes: object) -> Any:
    return apply_overrides(sample(**changes), overrides)


def refused(*overrides: str, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        overridden(*overrides, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=-3", -3),
        ("global_batch_size=96", 96),
        ("grad_clip_norm=0.5", 0.5),
        ("grad_clip_norm=1", 1.0),
        ("grad_clip_norm=none", None),
        ("num_slots=null", None),
        ("compile=true", True),
        ("compile=False", False),
        ("precision=bf16", "bf16"),
        ("name=run 2", "run 2"),
        ("valid_data=none", None),
    ],
)
def test_fields_are_parsed_by_their_type(text: str, value: object) -> None:
    result = getattr(overridden(text), text.partition("=")[0])
    assert (type(result), result) == (type(value), value)


def test_classes_are_names_a_list_or_a_word() -> None:
    for text, value in (("true", True), ("Block", ("Block",)), ("Block, Head", ("Block", "Head"))):
        assert overridden(f"activation_checkpointing={text}").activation_checkpointing == value
    assert overridden("activation_checkpointing=['Block']").activation_checkpointing == ("Block",)
    assert (
        overridden("activation_checkpointing=false", activation_checkpointing=nn.Linear).activation_checkpointing
        is False
    )
    assert "expected bool | str | tuple, got 'a b'" in refused("activation_checkpointing=a b")


def test_parts_of_a_group_keep_each_other() -> None:
    config = overridden("checkpoint.keep=5", "checkpoint.every_s=60", checkpoint={"every_steps": 7})
    assert (config.checkpoint.keep, config.checkpoint.every_s, config.checkpoint.every_steps) == (5, 60.0, 7)
    assert overridden("log.tensorboard=false").log.tensorboard is False
    assert overridden("log.tensorboard=auto").log.tensorboard == "auto"
    assert overridden("validate.every_steps=9").validate.every_steps == 9


def test_keywords_of_a_partial() -> None:
    optimizer = overridden("optimizer.lr=3e-4", "optimizer.betas=(0.8, 0.99)").optimizer
    assert optimizer.func is adam
    assert optimizer.keywords == {"lr": 3e-4, "betas": (0.8, 0.99)}


def test_a_function_becomes_a_partial() -> None:
    config = overridden("model.width=48", "loss.smoothing=0.1")
    assert (config.model.func, config.model.keywords) == (net, {"width": 48})
    assert config.loss.keywords == {"smoothing": 0.1}


def test_keywords_of_one_metric() -> None:
    config = overridden("metrics.accuracy.num_classes=12")
    assert config.metrics["accuracy"].keywords == {"num_classes": 12}
    assert sample().metrics["accuracy"].keywords == {"num_classes": 10}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.depth=3", 3),
        ("model.depth=none", None),
        ("model.dropout=1", 1.0),
        ("model.kind=large", "large"),
        ("model.norm=false", False),
        ("model.layers=[1, 2]", (1, 2)),
        ("model.untyped=[1, 'a']", [1, "a"]),
        ("model.untyped=true", True),
        ("train_data.root=none", "none"),
        ("train_data.whatever=3", 3),
    ],
)
def test_keywords_are_parsed_by_default_and_annotation(text: str, value: object) -> None:
    head, name = text.partition("=")[0].split(".")
    result = getattr(overridden(text), head).keywords[name]
    assert (type(result), result) == (type(value), value)


def test_the_present_value_counts_too() -> None:
    def build(size=None):  # type: ignore[no-untyped-def]
        raise AssertionError("overriding builds nothing")

    assert overridden("model.size=text", model=partial(build, size="a")).model.keywords == {"size": "text"}
    assert "expected int | none" in refused("model.size=text", model=partial(build, size=3))
    assert overridden("model.size=7", model=partial(build, size=3)).model.keywords == {"size": 7}


def test_a_set_keyword_with_a_few_allowed_texts_takes_another_of_them() -> None:
    model = partial(net, kind="large")
    assert overridden("model.kind=small", model=model).model.keywords == {"kind": "small"}
    assert "expected small | large, got 'huge'" in refused("model.kind=huge", model=model)


def test_keywords_of_a_partial_inside_a_partial_and_of_a_dict() -> None:
    model = partial(net, act=partial(adam, lr=0.1), untyped={"a": 1})
    keywords = overridden("model.act.lr=0.2", "model.untyped.a=2", model=model).model.keywords
    assert keywords["act"].keywords == {"lr": 0.2}
    assert keywords["untyped"] == {"a": 2}
    stages = partial(net, changes={30: {"a": 1}})
    assert overridden("model.changes.30.a=2", model=stages).model.keywords["changes"] == {30: {"a": 2}}
    assert model.keywords["untyped"] == {"a": 1}


def test_of_two_the_later_holds_and_order_is_free() -> None:
    assert overridden("seed=1", "seed=2").seed == 2
    config = overridden("max_steps=3", "max_epochs=none")
    assert (config.max_steps, config.max_epochs) == (3, None)


def test_the_result_is_checked_as_a_whole() -> None:
    assert "got both" in refused("max_steps=3")
    assert "use 96 or 104, or num_slots=4, 5 or 10." in refused("global_batch_size=100", num_slots=8)
    assert refused("checkpoint.keep=0") == "checkpoint.keep: expected int > 0, got 0."
    assert 'compile: expected False with strategy="fsdp" and fsdp_gather="module", got True' in refused(
        "strategy=fsdp", "fsdp_gather=module", compile=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimzer.lr=3", "optimzer.lr=3: no such field; did you mean optimizer.lr?"),
        ("lr=3", "lr=3: no such field; did you mean optimizer.lr?"),
        ("batch_size=3", "batch_size=3: no such field; did you mean validate.batch_size or global_batch_size?"),
        ("checkpoint.kep=3", "checkpoint.kep=3: no such field; did you mean checkpoint.keep?"),
        ("qqq=3", "qqq=3: no such field; --help lists them."),
        ("max_grad_norm=1", "max_grad_norm=1: no such field; did you mean grad_clip_norm?"),
        ("save_steps=9", "save_steps=9: no such field; did you mean checkpoint.every_steps?"),
        (
            "gradient_accumulation_steps=4",
            "gradient_accumulation_steps=4: no such field; did you mean num_slots? The global batch has this many "
            "parts; a rank runs its own one by one, and adds up their gradients.",
        ),
        ("optimizer.lrr=3", "optimizer.lrr=3: adam takes no lrr; did you mean optimizer.lr?"),
        ("optimizer.parameters=3", "optimizer.parameters=3: adam takes no parameters; it has lr and betas."),
        ("metrics.f1.num_classes=3", "metrics.f1.num_classes=3: metrics has no f1; it has accuracy."),
        (
            "validate=3",
            "validate=3: validate is a group of fields; it has validate.every_steps, validate.batch_size and "
            "validate.collate.",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_epochs=many", "expected int > 0 | none, got 'many'."),
        ("max_epochs=", "expected int > 0 | none, got ''."),
        ("compile=yes", "expected true | false, got 'yes'."),
        ("precision=fp23", "expected fp32 | bf16 | fp16 | apex | auto | (device) -> Precision, got 'fp23'."),
        ("optimizer.lr=big", "expected float, got 'big'."),
        ("optimizer.betas=0.9", "expected tuple, got '0.9'."),
        ("model.kind=huge", "expected small | large, got 'huge'."),
        ("model.width=1.5", "expected int, got '1.5'."),
        (
            "model.untyped=relu",
            "expected a Python literal such as 3, 0.1, true, 'text' in quotes or (1, 2), got 'relu'.",
        ),
    ],
)
def test_an_ill_typed_value_says_expected_and_got(text: str, expected: str) -> None:
    assert refused(text) == f"{text}: {expected}"


@pytest.mark.parametrize("text", ["max_epochs", "=3", "", " =3"])
def test_what_is_no_override_says_what_one_is(text: str) -> None:
    assert "expected KEY=VALUE, such as max_epochs=2" in refused(text)


def test_functions_cannot_be_given_as_text() -> None:
    assert refused("model=resnet").startswith(
        "model=resnet: a function cannot be given as text; set model in the cfg.py"
    )
    assert "or here its keywords: optimizer.lr or optimizer.betas." in refused("optimizer=sgd")
    assert "a function cannot be given as text; set model.act in the cfg.py" in refused("model.act=relu")
    assert "a function cannot be given as text" in refused("metrics.accuracy=f1")
    assert "a function cannot be given as text" in refused("handlers=mine")


def test_a_built_object_takes_no_keywords() -> None:
    message = refused("loss.label_smoothing=0.1", loss=nn.CrossEntropyLoss())
    assert "expected loss to be a function or a partial that takes label_smoothing, got a CrossEntropyLoss" in message


def test_settable_lists_fields_and_keywords_but_no_functions() -> None:
    keys = settable(sample())
    assert {"seed", "checkpoint.keep", "optimizer.lr", "model.width", "metrics.accuracy.num_classes"} <= set(keys)
    assert not {"model", "optimizer", "handlers", "optimizer.parameters", "loss.y_pred"} & set(keys)
