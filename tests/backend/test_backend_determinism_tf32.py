"""set_tf32: one setting for matrix products and convolutions, which torch's older and newer names both show."""

import warnings

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend, set_tf32

NEWER = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.conv, "fp32_precision")]


def settings(backend: Backend, before: str, wanted: list[bool]) -> list[tuple[object, ...]]:
    """Set it after other code has, and read it by the older and the newer names."""
    if before == "newer names":
        for module, name in NEWER:
            setattr(module, name, "tf32")
    if before == "older names":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
    results = []
    for enabled in wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_tf32(enabled)
        older = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        results.append((*older, *(getattr(module, name) == "tf32" for module, name in NEWER)))
    assert not torch.cuda.is_initialized()
    return results


@pytest.mark.parametrize("before", ["nothing", "older names", "newer names"])
def test_products_and_convolutions_show_it_by_every_name(ranks: Ranks, before: str) -> None:
    assert ranks(1, settings, before, [False, True, False], fresh=True) == [[(False,) * 4, (True,) * 4, (False,) * 4]]
