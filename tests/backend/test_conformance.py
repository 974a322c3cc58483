"""The same checks for every backend: single, threads, gloo on 1, 2 and 3 ranks, and nccl on a machine with CUDA.

tests/xla runs these checks on 1, 2 and 4 XLA devices. The values in them are for at most 4 ranks.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend, Op, connect
from disttrain.backend.threads import ThreadsBackend
from disttrain.errors import BackendError, RemoteError

WORLDS = ["single", "threads-1", "threads-3", "gloo-1", "gloo-2", "gloo-3"]
WORLDS += ["nccl-1"] * torch.cuda.is_available()

Run = Callable[..., list[Any]]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, ranks: Ranks) -> Run:
    """Run a function of this module on every rank of one world, and return the results by rank."""
    name, _, size = request.param.partition("-")

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        if name == "gloo":
            return ranks(int(size), function, *args)
        if name == "threads":
            return in_threads(int(size), function, *args)
        with connect(name, device="cpu" if name == "single" else None, timeout_s=30) as backend:
            return [function(backend, *args)]

    return run


def in_threads(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    def body(rank: int) -> Any:
        with ThreadsBackend(rank, size, timeout_s=30) as backend:
            return function(backend, *args)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(body, range(size)))


def raised_by(call: Callable[[], object]) -> tuple[str, str]:
    """Return the type and the message of the error that `call` raises; ("", "") without an error."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# --- topology


def topology(backend: Backend) -> tuple[Any, ...]:
    by_rank = backend.rank, backend.local_rank, backend.node_rank
    sizes = backend.world_size, backend.local_world_size, backend.num_nodes
    group = backend.process_group
    return by_rank, sizes, backend.restarts, isinstance(backend.device, torch.device), group and group.size()


def test_topology(world: Run) -> None:
    results = world(topology)
    for rank, result in enumerate(results):
        assert result[:4] == ((rank, rank, 0), (len(results), len(results), 1), 0, True)
        assert result[4] in (None, len(results))


# --- all_reduce

ORACLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda t: t.sum(0),
    "mean": lambda t: t.mean(0),
    "min": lambda t: t.amin(0),
    "max": lambda t: t.amax(0),
    "product": lambda t: t.prod(0),
}
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


def a_tensor(rank: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return multiples of 6: their sums, products and means over 1 to 4 ranks are exact in every order."""
    values = (torch.arange(math.prod(shape)) * 7 + rank * 5) % 4 * 6
    return (values > 6 if dtype == "bool" else values).to(getattr(torch, dtype)).reshape(shape)


CASES = [
    (dtype, shape, op)
    for dtype in DTYPES
    for shape in [(3, 2), (), (0,), (2, 0, 3), (1,), (2, 3, 4)]
    for op in {"bool": ["min", "max"], "complex64": ["sum", "mean", "product"]}.get(dtype, list(ORACLES))
]


def reduce_tensors(backend: Backend) -> list[torch.Tensor]:
    results = []
    for dtype, shape, op in CASES:
        value = a_tensor(backend.rank, dtype, shape).to(backend.device)
        before = value.clone()
        result = backend.all_reduce(value, op)  # type: ignore[type-var]
        assert torch.equal(value, before)
        assert result is not value
        assert result.data_ptr() != value.data_ptr() or not value.data_ptr()  # XLA's tensors have no addresses
        assert result.device == value.device
        results.append(result.cpu())
    return results


def test_all_reduce_of_tensors(world: Run) -> None:
    by_rank = world(reduce_tensors)
    for results in by_rank:
        for (dtype, shape, op), result in zip(CASES, results, strict=True):
            inputs = torch.stack([a_tensor(rank, dtype, shape) for rank in range(len(by_rank))])
            wide = inputs if dtype in ("bool", "complex64") else inputs.double()
            keeps = op != "mean" or inputs.is_floating_point() or inputs.is_complex()
            expected = ORACLES[op](wide).to(inputs.dtype if keeps else torch.float32)
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            assert torch.equal(result, expected), f"{op} of {dtype}{list(shape)}"


def reduce_strange_views(backend: Backend) -> list[torch.Tensor]:
    base = torch.arange(12.0).reshape(3, 4) + backend.rank
    with_gradient = torch.ones(2, requires_grad=True)
    complex_view = torch.complex(base, -base).conj()
    return [
        backend.all_reduce(view) for view in (base.t(), base[:, 1], base.expand(2, 3, 4), with_gradient, complex_view)
    ]


def test_all_reduce_of_views(world: Run) -> None:
    results = world(reduce_strange_views)
    base = sum(torch.arange(12.0).reshape(3, 4) + rank for rank in range(len(results)))
    assert isinstance(base, torch.Tensor)
    for transposed, column, expanded, plain, conjugate in results:
        assert torch.equal(transposed, base.t())
        assert torch.equal(column, base[:, 1])
        assert torch.equal(expanded, base.expand(2, 3, 4))
        assert torch.equal(plain, torch.full((2,), float(len(results))))
        assert not plain.requires_grad
        assert torch.equal(conjugate, torch.complex(base, base))


def reduce_in_pieces(backend: Backend) -> torch.Tensor:
    from disttrain.backend import checked

    whole = 2**26
    checked.REDUCE_PIECE_BYTES = 64
    try:
        return backend.all_reduce(torch.arange(1001) + backend.rank)
    finally:
        checked.REDUCE_PIECE_BYTES = whole


def test_all_reduce_in_pieces(world: Run) -> None:
    results = world(reduce_in_pieces)
    expected = sum(torch.arange(1001) + rank for rank in range(len(results)))
    assert all(torch.equal(result, torch.as_tensor(expected)) for result in results)


NUMBERS: list[tuple[list[Any], Any, Callable[[Any], Any]]] = [
    ([3, -5, 7, 11], "sum", sum),
    ([3, -5, 7, 11], "product", math.prod),
    ([3, -5, 7, -11], "min", min),
    ([3, -5, 8, 1], "mean", lambda v: sum(v) / len(v)),
    ([2**100, 1, 2, 3], "sum", sum),
    ([0.5, 0.25, -4.0, 8.0], "sum", math.fsum),
    ([0.5, 0.25, -4.0, 8.0], "max", max),
    ([0.5, 1.5, 4.0, 2.0], "mean", lambda v: math.fsum(v) / len(v)),
    ([math.inf, 1.0, 2.0, 3.0], "max", max),
    ([True, False, True, True], "min", all),
    ([False, False, True, False], "max", any),
]


def reduce_numbers(backend: Backend) -> tuple[list[Any], list[Any]]:
    nans = [backend.all_reduce([math.nan, 1.0, 2.0, 3.0][backend.rank], op) for op in get_args(Op)]
    return [backend.all_reduce(values[backend.rank], op) for values, op, _ in NUMBERS], nans


def test_all_reduce_of_numbers(world: Run) -> None:
    by_rank = world(reduce_numbers)
    expected = [oracle(values[: len(by_rank)]) for values, _, oracle in NUMBERS]
    for results, nans in by_rank:
        assert [(type(result), result) for result in results] == [(type(value), value) for value in expected]
        assert all(math.isnan(result) for result in nans)


# --- all_gather


def gather(backend: Backend, values: list[Any]) -> Any:
    return backend.all_gather(values[backend.rank])


def test_all_gather_stacks_tensors(world: Run) -> None:
    values = [a_tensor(rank, "int16", (2, 3)) for rank in range(4)]
    results = world(gather, values)
    assert all(torch.equal(result, torch.stack(values[: len(results)])) for result in results)


def test_all_gather_of_anything_else_is_a_list_by_rank(world: Run) -> None:
    values = [{"rank": 0, "text": "ä" * 5000}, None, [1, 2.5, "three", torch.ones(2).tolist()], 4]
    results = world(gather, values)
    assert results == [values[: len(results)]] * len(results)


# --- broadcast


VALUES = [7, 0.1, True, "text", None, {"a": [1, (2, 3)]}, "long " * 4000, b"\0" * 300]
TENSORS = [(dtype, shape) for dtype in DTYPES for shape in ((2, 3), (), (0, 4))]


def spread(backend: Backend) -> list[tuple[list[Any], list[torch.Tensor]]]:
    """Broadcast everything from every rank."""
    results = []
    for source in range(backend.world_size):
        mine = backend.rank == source
        values = [backend.broadcast(value if mine else None, source) for value in VALUES]
        tensors = [backend.broadcast(a_tensor(source, *case) if mine else None, source) for case in TENSORS]
        results.append((values, tensors))
    return results


def test_broadcast(world: Run) -> None:
    for by_source in world(spread):
        for source, (values, tensors) in enumerate(by_source):
            assert values == VALUES
            for case, tensor in zip(TENSORS, tensors, strict=True):
                assert tensor.dtype == getattr(torch, case[0])
                assert torch.equal(tensor, a_tensor(source, *case))


def spread_is_a_copy(backend: Backend) -> tuple[bool, bool]:
    tensor, values = torch.ones(3), [1, 2]
    got = backend.broadcast(tensor)
    listed = backend.broadcast(values)
    got += 1
    listed.append(3)
    return torch.equal(tensor, torch.ones(3)), values == [1, 2]


def test_broadcast_never_changes_what_was_passed(world: Run) -> None:
    assert all(result == (True, True) for result in world(spread_is_a_copy))


# --- barrier, start_any


def leave_a_file(backend: Backend, folder: str) -> int:
    time.sleep(0.1 * backend.rank)
    Path(folder, str(backend.rank)).touch()
    backend.barrier()
    return len(list(Path(folder).iterdir()))


def test_no_rank_passes_a_barrier_before_all_have_come(world: Run, tmp_path: Path) -> None:
    results = world(leave_a_file, str(tmp_path))
    assert results == [len(results)] * len(results)


def ask(backend: Backend, flags: list[list[bool]]) -> list[bool]:
    """Start several reductions at a time, with other collectives in between."""
    answers = []
    for question in flags:
        answers.append(backend.start_any(question[backend.rank]))
        backend.all_reduce(1.0)
    return [answer() for answer in answers] + [answers[0]()]


def test_start_any_is_true_if_one_flag_is(world: Run) -> None:
    flags = [[False] * 4, [True, False, False, False], [True] * 4, [False, False, True, False]]
    results = world(ask, flags)
    expected = [any(question[: len(results)]) for question in flags]
    assert results == [expected + expected[:1]] * len(results)


# --- agree, one_rank_first


def agree_that(backend: Backend, failing: list[int]) -> Any:
    with backend.agree("building"):
        if backend.rank in failing:
            raise KeyError(f"no such part on {backend.rank}")
    return "built"


def catch_disagreement(backend: Backend, failing: list[int]) -> tuple[str, str, int]:
    return *raised_by(lambda: agree_that(backend, failing)), backend.all_reduce(1)


def test_agree_passes_if_no_rank_raises(world: Run) -> None:
    assert all(result == "built" for result in world(agree_that, []))


@pytest.mark.parametrize("failing", [[0], [0, 1, 2], [2, 1], [2]])
def test_agree_raises_on_all_ranks_if_one_raises(world: Run, failing: list[int]) -> None:
    results = world(catch_disagreement, failing)
    failed = [rank for rank in failing if rank < len(results)]
    for rank, (kind, message, count) in enumerate(results):
        assert count == len(results)
        if rank in failed:
            assert (kind, message) == ("KeyError", f"'no such part on {rank}'")
        elif failed:
            assert (kind, message) == (
                "RemoteError",
                f"rank {min(failed)} failed: KeyError: 'no such part on {min(failed)}'",
            )
        else:
            assert kind == ""


def disagree_deep_inside(backend: Backend) -> tuple[str, str, int]:
    def body() -> None:
        with backend.agree("the outer"), backend.agree("the inner"):
            if backend.rank == backend.world_size - 1:
                raise ValueError("deep")
            backend.all_reduce(1)

    return *raised_by(body), backend.all_reduce(1)


def test_a_rank_that_fails_inside_agree_wakes_ranks_that_are_in_a_collective(world: Run) -> None:
    results = world(disagree_deep_inside)
    last = len(results) - 1
    assert results[last] == ("ValueError", "deep", len(results))
    assert results[:last] == [("RemoteError", f"rank {last} failed: ValueError: deep", len(results))] * last


def first_come(backend: Backend, folder: str, local: bool) -> list[str]:
    seen = []
    with backend.one_rank_first(local=local):
        seen = sorted(path.name for path in Path(folder).iterdir())
        time.sleep(0.05)
        Path(folder, f"rank-{backend.rank}").touch()
    return seen


@pytest.mark.parametrize("local", [False, True])
def test_one_rank_goes_first(world: Run, tmp_path: Path, local: bool) -> None:
    results = world(first_come, str(tmp_path), local)
    assert results[0] == []
    assert all("rank-0" in seen for seen in results[1:])
    assert len(list(tmp_path.iterdir())) == len(results)


def first_fails(backend: Backend) -> tuple[str, str, bool, int]:
    ran = False

    def body() -> None:
        nonlocal ran
        with backend.one_rank_first():
            ran = True
            raise OSError("no network")

    return *raised_by(body), ran, backend.all_reduce(1)


def test_if_the_first_rank_fails_the_others_do_not_try(world: Run) -> None:
    results = world(first_fails)
    size = len(results)
    assert results[0] == ("OSError", "no network", True, size)
    assert results[1:] == [("RemoteError", "rank 0 failed: OSError: no network", False, size)] * (size - 1)


def only_rank_zero(backend: Backend) -> Any:
    return backend.rank_zero_only(lambda x: x + 1)(41)


def test_rank_zero_only(world: Run) -> None:
    results = world(only_rank_zero)
    assert results == [42] + [None] * (len(results) - 1)


# --- errors

REFUSED: dict[str, tuple[str, Callable[[Backend], object]]] = {
    "unknown op": ("ValueError", lambda b: b.all_reduce(1, "median")),  # type: ignore[arg-type]
    "no number": ("TypeError", lambda b: b.all_reduce("text")),
    "counted bools": ("TypeError", lambda b: b.all_reduce(True)),
    "counted bool tensors": ("TypeError", lambda b: b.all_reduce(torch.ones(2, dtype=torch.bool), "mean")),
    "ordered complex": ("TypeError", lambda b: b.all_reduce(torch.ones(2) * 1j, "max")),
    "sparse": ("TypeError", lambda b: b.all_gather(torch.eye(2).to_sparse())),
    "meta": ("TypeError", lambda b: b.broadcast(torch.empty(2, device="meta"), b.world_size - 1)),
    "unpicklable": ("TypeError", lambda b: b.all_gather(lambda: None)),
    "unpicklable from one": ("TypeError", lambda b: b.broadcast(lambda: None)),
    "source too high": ("ValueError", lambda b: b.broadcast(1, b.world_size)),
    "source below 0": ("ValueError", lambda b: b.broadcast(1, -1)),
    "source no rank": ("TypeError", lambda b: b.broadcast(1, "0")),  # type: ignore[arg-type]
}


def refused(backend: Backend) -> list[tuple[str, str, int]]:
    return [(*raised_by(lambda call=call: call(backend)), backend.all_reduce(1)) for _, call in REFUSED.values()]  # type: ignore[misc]


def test_wrong_arguments(world: Run) -> None:
    by_rank = world(refused)
    for name, outcomes in zip(REFUSED, zip(*by_rank, strict=True), strict=True):
        kinds = {kind for kind, _, _ in outcomes}
        assert REFUSED[name][0] in kinds, name
        assert kinds <= {REFUSED[name][0], "RemoteError"}, name
        assert all(message and count == len(by_rank) for _, message, count in outcomes), name


CALLS: dict[str, Callable[[Backend], object]] = {
    "all_reduce(int, op='sum')": lambda b: b.all_reduce(1),
    "all_reduce(int, op='max')": lambda b: b.all_reduce(1, "max"),
    "all_reduce(float, op='sum')": lambda b: b.all_reduce(1.0),
    "all_reduce(float32[2, 3], op='sum')": lambda b: b.all_reduce(torch.ones(2, 3)),
    "all_reduce(float32[3, 2], op='sum')": lambda b: b.all_reduce(torch.ones(3, 2)),
    "all_reduce(float64[2, 3], op='sum')": lambda b: b.all_reduce(torch.ones(2, 3, dtype=torch.float64)),
    "all_gather(float32[2, 3])": lambda b: b.all_gather(torch.ones(2, 3)),
    "all_gather(objects)": lambda b: b.all_gather("x" * 3000),
    "broadcast(source=0)": lambda b: b.broadcast("x" * 3000, 0),
    "broadcast(source=1)": lambda b: b.broadcast("x" * 3000, 1),
    "barrier()": lambda b: b.barrier(),
    "start_any()": lambda b: b.start_any(True)(),
    "one_rank_first(local=False)": lambda b: use(b.one_rank_first()),
    "agree('that')": lambda b: use(b.agree("that")),
}


def use(context: Any) -> None:
    with context:
        pass


CALLS["agree('this')"] = lambda b: use(b.agree("this"))


PAIRS = list(zip(CALLS, [*list(CALLS)[1:], next(iter(CALLS))], strict=True))


def mismatches(backend: Backend) -> list[tuple[str, str, int]]:
    """Make the first call of every pair on rank 0 and the second on the others; the backend works after each pair."""
    calls = [CALLS[pair[min(backend.rank, 1)]] for pair in PAIRS]
    return [(*raised_by(lambda call=call: call(backend)), backend.all_reduce(1)) for call in calls]  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_call_different_collectives_all_get_the_error(ranks: Ranks, size: int) -> None:
    others = "rank 1" if size == 2 else "ranks 1, 2"
    for results in ranks(size, mismatches):
        for (first, second), (kind, message, count) in zip(PAIRS, results, strict=True):
            assert kind == "BackendError"
            assert f"rank 0: {first}; {others}: {second};" in message
            assert count == size


def one_cannot_pickle(backend: Backend) -> tuple[str, str, int]:
    value = (lambda: None) if backend.rank == 1 else "fine"
    return *raised_by(lambda: backend.all_gather(value)), backend.all_reduce(1)


def test_an_argument_that_is_wrong_on_one_rank(ranks: Ranks) -> None:
    first, second, third = ranks(3, one_cannot_pickle)
    assert second[0] == "TypeError"
    assert first == third
    assert first[0] == "RemoteError"
    assert first[1].startswith("rank 1 failed: TypeError: ")
    assert {first[2], second[2], third[2]} == {3}


# --- the end


def use_after_close(backend: Backend) -> list[tuple[str, str]]:
    pending = backend.start_any(True)
    assert pending()
    backend.close()
    backend.close()
    calls = [CALLS[name] for name in CALLS]
    return [raised_by(lambda call=call: call(backend)) for call in calls]  # type: ignore[misc]


def test_a_closed_backend_refuses_every_call(world: Run) -> None:
    for results in world(use_after_close):
        for kind, message in results:
            assert kind == BackendError.__name__
            assert "closed" in message


def fail_together(backend: Backend) -> tuple[Any, ...]:
    before = backend.first_failure(0)
    raised_by(backend.barrier)  # a rank that has passed it may fail before another rank passes it
    backend.fail(ValueError(f"from {backend.rank}"))
    failure = backend.first_failure()
    later = raised_by(backend.barrier)
    return before, failure and (failure.rank, failure.message), later


def test_every_rank_gets_the_same_first_failure(world: Run) -> None:
    results = world(fail_together)
    assert len({result[1] for result in results}) == 1
    for before, failure, later in results:
        assert before is None
        assert failure[1] == f"ValueError: from {failure[0]}"
        assert later == (RemoteError.__name__, f"rank {failure[0]} failed: ValueError: from {failure[0]}")
