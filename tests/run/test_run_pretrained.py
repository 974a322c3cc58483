"""Descriptions of models of transformers in checkpoints: with a double of its base class, and with transformers."""

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_run, trained
from torch import Tensor, nn

from disttrain.checkpoint import CheckpointInfo, export, load, save
from disttrain.run.pretrained import pretrained_in, pretrained_position, tied_names

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is missing"
)


class PreTrainedModel(nn.Module):
    """A double of the base class of transformers."""


PreTrainedModel.__module__ = "transformers.modeling_utils"


class Settings:
    """A double of a config."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_json_string(self) -> str:
        return json.dumps(self.values)


class Double(PreTrainedModel):
    """A model whose head is its embedding, as its class says."""

    all_tied_weights_keys = {"out.weight": "embed.weight", "absent.weight": "embed.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings(model_type="double")
        self.generation_config = Settings(top_k=2, compile_config="x")
        self.embed = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 3, bias=False)
        self.out.weight = self.embed.weight

    def can_generate(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x)).sum(1, keepdim=True)


class OlderDouble(Double):
    """As transformers before version 5 says it."""

    all_tied_weights_keys = None  # type: ignore[assignment]
    _tied_weights_keys = (r"^out\.wei",)


@pytest.fixture
def _imported(monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" not in sys.modules:
        monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))


DESCRIBED = {
    "architecture": "Double",
    "config": {"model_type": "double"},
    "generation_config": {"top_k": 2},
    "tied": ["out.weight"],
}


@pytest.mark.usefixtures("_imported")
def test_a_checkpoint_describes_the_model_and_an_export_holds_a_tied_tensor_once(tmp_path: Path) -> None:
    trained(tmp_path, model=Double, max_epochs=1)
    path = tmp_path / "small" / "checkpoints" / "step-00000004"
    assert load(path).manifest.position["pretrained"] == {"": DESCRIBED}
    assert export(path, tmp_path / "out", form="hf").num_tensors == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"architectures": ["Double"], "dtype": "float32", "model_type": "double"}


@pytest.mark.usefixtures("_imported")
def test_models_inside_are_found_and_those_with_adapters_are_not() -> None:
    inside = nn.ModuleDict({"encoder": Double(), "head": nn.Linear(3, 1)})
    assert list(pretrained_in(inside)) == ["encoder"]
    nested = Double()
    nested.inner = Double()
    assert list(pretrained_in(nested)) == [""]
    for outer, module in ((inside, inside), (inside, inside["encoder"])):
        module.peft_config = {}  # type: ignore[assignment]
        assert pretrained_in(outer) == {}
        del module.peft_config
    inside["encoder"]._hf_peft_config_loaded = True  # type: ignore[assignment]
    assert pretrained_position(inside) == {}


@pytest.mark.usefixtures("_imported")
def test_the_name_of_a_class_that_fsdp_has_changed_is_the_own_one() -> None:
    model = Double()
    model.__class__ = type("FSDPDouble", (Double,), {})
    assert pretrained_position(model)["pretrained"][""] == DESCRIBED


@pytest.mark.usefixtures("_imported")
def test_a_config_that_is_not_json_stops_no_run(caplog: pytest.LogCaptureFixture) -> None:
    model = Double()
    model.config = Settings(model_type=object())
    assert pretrained_position(nn.ModuleDict({"odd": model, "good": Double()})) == {"pretrained": {"good": DESCRIBED}}
    assert "--format hf will not export odd: " in caplog.text


def test_ties_are_those_that_are_there() -> None:
    assert tied_names(Double()) == tied_names(OlderDouble()) == ["out.weight"]
    for model in (Double(), OlderDouble()):
        model.out.weight = nn.Parameter(torch.zeros(3, 3))
        assert tied_names(model) == []


def test_a_run_without_transformers_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert "pretrained" not in small_run(tmp_path).position()


def families() -> dict[str, Callable[[], Any]]:
    """Return small models of transformers: tied in two ways, untied, with converted names, without text."""
    import transformers as t

    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    text = {"vocab_size": 32, **small}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2}
    return {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**text)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=32, **sizes)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**text)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**text, **experts)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, num_labels=3, **small)),
    }


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "mixtral", "vit"])
@pytest.mark.parametrize("max_shard_bytes", [None, 2000])
def test_from_pretrained_loads_every_family(tmp_path: Path, family: str, max_shard_bytes: int | None) -> None:
    torch.manual_seed(3)
    model = families()[family]()
    info = CheckpointInfo(position=pretrained_position(model))
    path = save(tmp_path / "c", 1, {"model": model.state_dict()}, info=info)
    done = export(path, tmp_path / "out", form="hf", max_shard_bytes=max_shard_bytes)
    assert (done.num_files > 1) == (max_shard_bytes is not None)
    found, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    assert tied_names(found) == tied_names(model)
