"""The table of devices and precisions: each pair works, or is refused with the precisions that work."""

import sys
from pathlib import Path

import pytest
import torch

from disttrain.devices import DEVICE_TYPES, OTHER, device_row
from disttrain.errors import ConfigError
from disttrain.precision import AMP, FP32, choose_precision


@pytest.mark.parametrize(("name", "kind", "scaled"), [("fp32", FP32, False), ("bf16", AMP, False), ("fp16", AMP, True)])
def test_cpu_has_all_three_of_torch(name, kind, scaled):
    precision = choose_precision(name, torch.device("cpu"))
    assert (type(precision), precision.name) == (kind, name)
    assert bool(getattr(precision, "scaler", None)) is scaled


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # torch's own, where there is no GPU
def test_fp16_and_bf16_are_cudas_too():
    assert choose_precision("bf16", "cuda:0").name == "bf16"
    assert choose_precision("fp16", "cuda").name == "fp16"


@pytest.mark.parametrize(
    ("name", "device", "instead"),
    [
        ("fp16", "xla", "use fp32 or bf16 or auto"),
        ("bf16", "mps", "use fp32 or auto"),
        ("apex", "cpu", "use fp32 or bf16 or fp16 or auto"),
        ("apex", "xpu", "use fp32 or bf16 or auto"),
        ("fp8", "cuda", "use fp32 or bf16 or fp16 or apex or auto"),
    ],
)
def test_what_does_not_work_is_refused_with_what_does(name, device, instead):
    with pytest.raises(ConfigError, match=f"precision='{name}' .*{device!r}.*{instead}"):
        choose_precision(name, device)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_auto_is_fp32_where_bfloat16_is_not_surely_faster(device):
    assert choose_precision("auto", device).name == "fp32"


@pytest.mark.parametrize(("has_it", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_on_a_gpu_that_has_it(has_it, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert choose_precision("auto", "cuda").name == name


@pytest.mark.parametrize(("name", "device"), [("apex", "cuda"), ("fp32", "xla"), ("auto", "xla")])
def test_a_missing_package_is_a_config_error_that_says_what_to_install(name, device, monkeypatch):
    for package in ("apex", "torch_xla"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / package).exists()])
    with pytest.raises(ConfigError, match=r"precision='\w+': expected .* install"):
        choose_precision(name, device)


def test_a_precision_of_ones_own_is_made_for_the_device():
    asked = []

    class Fifth(FP32):
        name = "fifth"

        def __init__(self, device):
            asked.append(device)

    assert choose_precision(Fifth, "cpu").name == "fifth"
    assert asked == [torch.device("cpu")]
    with pytest.raises(ConfigError, match=r"prepare, forward, backward, update.*got None from .*subclass of FP32"):
        choose_precision(lambda device: None, "cpu")


def test_the_docs_show_the_same_table():
    """docs/devices.md has a row for each device and a column for each precision; it refuses the same pairs."""
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text().split("## Which numbers where")[1]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.splitlines() if "|" in line]
    heading, _, *body = rows
    names = list(dict.fromkeys(name for row in DEVICE_TYPES.values() for name in row.precisions))
    assert heading == ["device", *names, "auto"]
    table = {row[0].strip("`"): row[1:5] for row in body if len(row) == 6}
    assert set(table) == {
        *(kind for kind in DEVICE_TYPES if device_row(kind).precisions != OTHER.precisions or kind == "xla"),
        "any other",
    }
    for device, cells in table.items():
        works = device_row(device).precisions
        assert [not cell.startswith("refused") for cell in cells] == [name in works for name in names], device
