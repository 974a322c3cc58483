"""The collectives, written once over the few primitives in which backends differ.

*Contract*: a subclass moves bytes (`_gather`, `_start_gather`, `_spread`) and keeps the board on which failures
are posted; everything that a caller can see, checks included, is here. So one rank obeys what many do.
"""

import json
import pickle
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from disttrain.backend import calls
from disttrain.backend.base import Backend, Contact, Op
from disttrain.backend.calls import ROOM_BYTES, Header, Status, describe
from disttrain.backend.failure import Board
from disttrain.backend.folding import check_plain, check_reducible, fold_numbers, fold_tensors
from disttrain.errors import BackendError, DisttrainError, RemoteError

T = TypeVar("T")

PIECE_BYTES = 2**26
"""What one gather of an all_reduce may hold at a time, over all ranks."""


class CheckedBackend(Backend):
    """Collectives that compare the ranks' calls before they move data."""

    _board: Board
    _closed = False

    @abstractmethod
    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        """Start to gather uint8[n], equally long on all ranks; the function returned gives [world_size, n]."""

    @abstractmethod
    def _spread(self, data: Tensor, source: int) -> None:
        """Overwrite `data`, uint8[n], by rank `source`'s."""

    def all_reduce(self, value: T, op: Op = "sum") -> T:
        refused = _refusal(lambda: check_reducible(value, op))
        is_number = isinstance(value, bool | int | float)
        payload = json.dumps(value).encode() if is_number and refused is None else b""
        text = f"all_reduce({describe(value)}, op={op!r})"
        payloads = self._meet(text, payload, refused)
        if is_number:
            return cast("T", fold_numbers([json.loads(p) for p in payloads], op))
        return cast("T", self._reduce(text, cast("Tensor", value).detach(), op))

    def _reduce(self, text: str, tensor: Tensor, op: str) -> Tensor:
        pieces = torch.split(tensor.reshape(-1), max(1, PIECE_BYTES // (tensor.itemsize * self.world_size)))
        folded = [self._fold(self._gather_tensor(text, piece), op) for piece in pieces]
        return torch.cat(folded).reshape(tensor.shape)

    def _fold(self, rows: Tensor, op: str) -> Tensor:
        return fold_tensors(rows, op)

    def all_gather(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            text = f"all_gather({describe(value)})"
            self._meet(text, refused=_refusal(lambda: check_plain(value)))
            return self._gather_tensor(text, value.detach())
        data, refused = _pickled(value)
        return [_unpickled(p) for p in self._meet("all_gather(objects)", data, refused)]

    def broadcast(self, value: T | None, source: int = 0) -> T:
        text = f"broadcast(source={source!r})"
        data, refused = b"", _refusal(lambda: self._check_source(source))
        if self.rank == source and refused is None:
            if isinstance(value, Tensor):
                refused = _refusal(lambda: check_plain(value))
                here = value.device.type == "cpu"
                meta: tuple[Any, ...] = ("tensor", value.dtype, tuple(value.shape), here)
            else:
                data, refused = _pickled(value)
                meta = ("inline", data) if len(data) < ROOM_BYTES // 2 else ("object", len(data))
            payload = pickle.dumps(meta)
        else:
            payload = b""
        kind, *rest = _unpickled(self._meet(text, payload, refused)[source])
        if kind == "tensor":
            return cast("T", self._spread_tensor(text, cast("Tensor | None", value), source, *rest))
        if kind == "object":
            buffer = _as_bytes(data) if self.rank == source else torch.empty(rest[0], dtype=torch.uint8)
            with self._contact(text):
                self._spread(buffer, source)
            return cast("T", _unpickled(buffer.numpy().tobytes()))
        return cast("T", _unpickled(rest[0]))

    def barrier(self) -> None:
        self._meet("barrier()")

    def start_any(self, flag: bool) -> Callable[[], bool]:
        text = "start_any()"
        answers: list[bool] = []
        collect = self._start_meeting(text, bytes([bool(flag)]))

        def answer() -> bool:
            if not answers:
                answers.append(any(header.payload != b"\0" for header in collect()))
            return answers[0]

        return answer

    @contextmanager
    def agree(self, what: str) -> Iterator[None]:
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if calls.is_shared(error):
                raise
            failed = error
        self._meet(f"agree({what!r})", failed=failed)

    @contextmanager
    def one_rank_first(self, *, local: bool = False) -> Iterator[None]:
        text = f"one_rank_first(local={local})"
        if (self.local_rank if local else self.rank) != 0:
            self._meet(text)
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if calls.is_shared(error):
                raise
            failed = error
        self._meet(text, failed=failed)

    def fail(self, error: BaseException) -> None:
        self._board.publish(error)

    def hurry(self) -> None:
        self._board.hurry()

    def first_failure(self, wait_s: float = 2.0) -> RemoteError | None:
        return self._board.first(wait_s)

    def _check_source(self, source: int) -> None:
        if not isinstance(source, int) or isinstance(source, bool):
            raise TypeError(f"expected source to be a rank, got {source!r}")
        if not 0 <= source < self.world_size:
            raise ValueError(f"expected source to be a rank from 0 to {self.world_size - 1}, got {source}")

    def _meet(
        self,
        text: str,
        payload: bytes = b"",
        refused: BaseException | None = None,
        failed: BaseException | None = None,
    ) -> list[bytes]:
        """Compare the ranks' calls, raise on all where something is wrong, return the payloads by rank."""
        headers = self._start_meeting(text, payload, refused, failed)()
        longest = max(header.payload_bytes for header in headers)
        if longest <= ROOM_BYTES:
            return [header.payload for header in headers]
        with self._contact(text):
            rows = self._start_gather(_as_bytes(payload.ljust(longest, b"\0")))()
        return [row[: h.payload_bytes].numpy().tobytes() for row, h in zip(rows, headers, strict=True)]

    def _start_meeting(
        self,
        text: str,
        payload: bytes = b"",
        refused: BaseException | None = None,
        failed: BaseException | None = None,
    ) -> Callable[[], list[Header]]:
        error, status = failed or refused, Status.OK
        if error is not None:
            status = Status.FAILED if failed is not None else Status.REFUSED
            payload = calls.cut(calls.describe_error(error), ROOM_BYTES)
        with self._contact(text):
            collect = self._start_gather(calls.encode(text, payload, status))

        def headers() -> list[Header]:
            try:
                with self._contact(text):
                    received = [calls.decode(row) for row in collect()]
            except DisttrainError as broken:
                if error is not None:
                    raise calls.mark_shared(error) from broken
                raise
            calls.compare(received, error)
            return received

        return headers

    def _gather_tensor(self, text: str, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.new_empty(self.world_size, *tensor.shape)
        data = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        with self._contact(text):
            rows = self._start_gather(data)()
        return rows.view(tensor.dtype).reshape(self.world_size, *tensor.shape)

    def _spread_tensor(
        self, text: str, value: Tensor | None, source: int, dtype: torch.dtype, shape: tuple[int, ...], here: bool
    ) -> Tensor:
        if self.rank == source and value is not None:
            tensor = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        else:
            tensor = torch.empty(shape, dtype=dtype, device="cpu" if here else self.device)
        if tensor.numel():
            with self._contact(text):
                self._spread(tensor.reshape(-1).view(torch.uint8), source)
        return tensor

    @contextmanager
    def _contact(self, text: str) -> Iterator[None]:
        """Turn a broken connection into the error behind it: a peer's failure, or its silence."""
        if self._closed:
            raise BackendError(f"{text} was called on a backend that is closed; call connect() again")
        if (failure := self._board.known()) is not None:  # not `first_failure`, which asks the store
            raise calls.mark_shared(failure)
        number = 1 if self.last_contact is None else self.last_contact.number + 1
        contact = self.last_contact = Contact(number, text, time.monotonic())
        try:
            yield
            contact.ended = time.monotonic()
        except DisttrainError:
            raise
        except RuntimeError as error:
            if (failure := self.first_failure()) is not None:
                raise calls.mark_shared(failure) from error
            raise calls.mark_shared(
                BackendError(
                    f"rank {self.rank} of {self.world_size} lost its peers in {text}: one died, was killed or did not "
                    f"come within the timeout; its own log says more. The network said: {error}"
                )
            ) from error


def _refusal(check: Callable[[], None]) -> Exception | None:
    """Return the error of an argument check, to be raised once all ranks know of it."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return error
    return None


def _pickled(value: object) -> tuple[bytes, Exception | None]:
    """Pickle `value`, or return why that is impossible."""
    try:
        return pickle.dumps(value), None
    except Exception as error:  # noqa: BLE001 - a __reduce__ of the user's may raise anything
        refused = TypeError(f"collectives take tensors and picklable values, got {describe(value)}: {error}")
        refused.__cause__ = error
        return b"", refused


def _unpickled(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301 - written by a rank of the same run


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
