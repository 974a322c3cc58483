"""make_deterministic: the settings that it changes, the values that it refuses, and the user's own settings."""

import os

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend, kernels_of, make_deterministic, refused_operations_named, set_cpu_threads
from disttrain.data import LoadingError
from disttrain.errors import ConfigError


def settings(backend: Backend, preset: str | None, threads: int, strict: bool = True) -> tuple[object, ...]:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if preset is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = preset
    torch.backends.cudnn.benchmark = True
    make_deterministic(threads, strict=strict)
    return (
        os.environ["CUBLAS_WORKSPACE_CONFIG"],
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.get_num_threads(),
    )


def test_everything_that_changes_bits_is_set(ranks: Ranks) -> None:
    assert ranks(1, settings, None, 2) == [(":4096:8", True, False, False, False, True, 2)]
    assert ranks(1, settings, None, 1, False) == [(":4096:8", True, True, False, False, True, 1)]


def scripted_bits(backend: Backend, num_calls: int) -> list[str]:
    make_deterministic()
    torch.manual_seed(0)
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
    for _ in range(num_calls):
        scripted(torch.ones(4, 4)).sum().backward()
    scripted.zero_grad()
    scripted(torch.linspace(-2, 2, 16).reshape(4, 4)).pow(2).mean().backward()
    return [value.hex() for parameter in scripted.parameters() for value in parameter.grad.flatten().tolist()]


def test_a_scripted_module_has_the_same_bits_after_any_number_of_calls(ranks: Ranks) -> None:
    assert len({str(ranks(1, scripted_bits, num_calls)) for num_calls in range(4)}) == 1


def test_a_workspace_of_the_users_is_kept(ranks: Ranks) -> None:
    assert ranks(1, settings, ":16:8", 1)[0][0] == ":16:8"
    assert ranks(1, settings, ":0:0", 1, False)[0][0] == ":0:0"


def refusal_of_a_workspace(backend: Backend) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(backend, ":0:0", 1)
    return str(caught.value)


def test_a_workspace_that_is_not_deterministic_is_refused(ranks: Ranks) -> None:
    (message,) = ranks(1, refusal_of_a_workspace)
    assert "CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, got ':0:0'" in message


def uses_put(tensor: torch.Tensor) -> None:
    tensor.put_(torch.tensor([1]), torch.ones(1))


class PutsInItsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        uses_put(grad)
        return grad


def refusal_of_put(backend: Backend, place: str) -> str:
    make_deterministic()
    with pytest.raises(ConfigError) as caught, refused_operations_named():
        if place == "forward":
            uses_put(torch.zeros(3))
        elif place == "backward":
            PutsInItsBackward.apply(torch.zeros(3, requires_grad=True)).sum().backward()
        else:
            try:
                uses_put(torch.zeros(3))
            except RuntimeError as error:
                raise ConfigError(f"the model raised {error}") from error
    return str(caught.value)


@pytest.mark.parametrize("place", ["forward", "backward", "inside another error"])
def test_a_refused_operation_is_named_with_its_place(ranks: Ranks, place: str) -> None:
    (message,) = ranks(1, refusal_of_put, place)
    assert message.startswith("expected operations that give the same bits each time, got put_ (called in uses_put, ")
    assert "test_backend_determinism.py, line" in message
    assert "deterministic=false" in message
    assert "warn_only" not in message  # torch's own advice is about a call that is not the user's


def test_an_operation_in_the_quoted_error_of_a_worker_is_named(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"got put_ .*deterministic=false"), refused_operations_named():
        raise LoadingError(
            "dataset[3] raised RuntimeError: put_ does not have a deterministic implementation, but you set ..."
        )


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, refused_operations_named():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("threads", [0, -1])
def test_an_operation_needs_a_thread(threads: int) -> None:
    with pytest.raises(ValueError, match=f"cpu_threads to be at least 1, got {threads}"):
        set_cpu_threads(threads)


def test_variables_that_choose_kernels_are_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    before = kernels_of(torch.device("cpu"))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert kernels_of(torch.device("cpu")) == f"{before}, OPENBLAS_CORETYPE=Haswell"
