"""The collectives of every backend, written once over the two primitives in which backends differ.

*Contract*: a subclass moves bytes (`_start_gather`, `_spread`) and has the board for failures. Everything that a caller
can see is here, checks included. So one rank obeys the same rules as many.
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

from disttrain.backend import headers
from disttrain.backend.base import Backend, Contact, Op
from disttrain.backend.failure import Board
from disttrain.backend.headers import ROOM_BYTES, Header, Status, describe_value
from disttrain.backend.reduce_ops import check_foldable, check_reducible, fold_numbers, fold_tensors
from disttrain.errors import BackendError, DisttrainError, RemoteError

T = TypeVar("T")

REDUCE_PIECE_BYTES = 2**26
"""The most bytes, over all ranks, that an all_reduce gathers at a time."""


class CheckedBackend(Backend):
    """A backend whose collectives compare the ranks' calls before they move data."""

    _board: Board
    _closed = False

    @abstractmethod
    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        """Start to gather uint8[n], of one length on all ranks; the returned function returns [world_size, n]."""

    @abstractmethod
    def _spread(self, data: Tensor, source: int) -> None:
        """Overwrite `data`, uint8[n], with the bytes of rank `source`."""

    def all_reduce(self, value: T, op: Op = "sum") -> T:
        refused = _refusal(lambda: check_reducible(value, op))
        is_number = isinstance(value, bool | int | float)
        payload = json.dumps(value).encode() if is_number and refused is None else b""
        text = f"all_reduce({describe_value(value)}, op={op!r})"
        payloads = self._compare(text, payload, refused)
        if is_number:
            return cast("T", fold_numbers([json.loads(number) for number in payloads], op))
        return cast("T", self._reduce(text, cast("Tensor", value).detach(), op))

    def _reduce(self, text: str, tensor: Tensor, op: str) -> Tensor:
        pieces = torch.split(tensor.reshape(-1), max(1, REDUCE_PIECE_BYTES // (tensor.itemsize * self.world_size)))
        folded = [self._fold(self._gather_tensor(text, piece), op) for piece in pieces]
        return torch.cat(folded).reshape(tensor.shape)

    def _fold(self, rows: Tensor, op: str) -> Tensor:
        return fold_tensors(rows, op)

    def all_gather(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            text = f"all_gather({describe_value(value)})"
            self._compare(text, refused=_refusal(lambda: check_foldable(value)))
            return self._gather_tensor(text, value.detach())
        data, refused = _pickled(value)
        return [_unpickled(payload) for payload in self._compare("all_gather(objects)", data, refused)]

    def broadcast(self, value: T | None, source: int = 0) -> T:
        text = f"broadcast(source={source!r})"
        data, refused = b"", _refusal(lambda: self._check_source(source))
        if self.rank == source and refused is None:
            if isinstance(value, Tensor):
                refused = _refusal(lambda: check_foldable(value))
                on_host = value.device.type == "cpu"
                meta: tuple[Any, ...] = ("tensor", value.dtype, tuple(value.shape), on_host)
            else:
                data, refused = _pickled(value)
                meta = ("inline", data) if len(data) < ROOM_BYTES // 2 else ("object", len(data))
            payload = pickle.dumps(meta)
        else:
            payload = b""
        kind, *details = _unpickled(self._compare(text, payload, refused)[source])
        if kind == "tensor":
            return cast("T", self._spread_tensor(text, cast("Tensor | None", value), source, *details))
        if kind == "object":
            buffer = _as_bytes(data) if self.rank == source else torch.empty(details[0], dtype=torch.uint8)
            with self._contact(text):
                self._spread(buffer, source)
            return cast("T", _unpickled(buffer.numpy().tobytes()))
        return cast("T", _unpickled(details[0]))

    def barrier(self) -> None:
        self._compare("barrier()")

    def start_any(self, flag: bool) -> Callable[[], bool]:
        text = "start_any()"
        answers: list[bool] = []
        collect = self._start_compare(text, bytes([bool(flag)]))

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
            if headers.is_shared(error):
                raise
            failed = error
        self._compare(f"agree({what!r})", failed=failed)

    @contextmanager
    def one_rank_first(self, *, local: bool = False) -> Iterator[None]:
        text = f"one_rank_first(local={local})"
        if (self.local_rank if local else self.rank) != 0:
            self._compare(text)
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if headers.is_shared(error):
                raise
            failed = error
        self._compare(text, failed=failed)

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

    def _compare(
        self,
        text: str,
        payload: bytes = b"",
        refused: BaseException | None = None,
        failed: BaseException | None = None,
    ) -> list[bytes]:
        """Compare the ranks' calls, raise on all ranks if a call is wrong, return the payloads by rank."""
        by_rank = self._start_compare(text, payload, refused, failed)()
        longest = max(header.payload_bytes for header in by_rank)
        if longest <= ROOM_BYTES:
            return [header.payload for header in by_rank]
        with self._contact(text):
            rows = self._start_gather(_as_bytes(payload.ljust(longest, b"\0")))()
        return [row[: header.payload_bytes].numpy().tobytes() for row, header in zip(rows, by_rank, strict=True)]

    def _start_compare(
        self,
        text: str,
        payload: bytes = b"",
        refused: BaseException | None = None,
        failed: BaseException | None = None,
    ) -> Callable[[], list[Header]]:
        error, status = failed or refused, Status.OK
        if error is not None:
            status = Status.FAILED if failed is not None else Status.REFUSED
            payload = headers.encode_text(headers.describe_error(error), ROOM_BYTES)
        with self._contact(text):
            collect = self._start_gather(headers.encode_header(text, payload, status))

        def received_headers() -> list[Header]:
            try:
                with self._contact(text):
                    received = [headers.decode_header(row) for row in collect()]
            except DisttrainError as broken:
                if error is not None:
                    raise headers.mark_shared(error) from broken
                raise
            headers.compare_headers(received, error)
            return received

        return received_headers

    def _gather_tensor(self, text: str, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.new_empty(self.world_size, *tensor.shape)
        data = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        with self._contact(text):
            rows = self._start_gather(data)()
        return rows.view(tensor.dtype).reshape(self.world_size, *tensor.shape)

    def _spread_tensor(
        self, text: str, value: Tensor | None, source: int, dtype: torch.dtype, shape: tuple[int, ...], on_host: bool
    ) -> Tensor:
        if self.rank == source and value is not None:
            tensor = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        else:
            tensor = torch.empty(shape, dtype=dtype, device="cpu" if on_host else self.device)
        if tensor.numel():
            with self._contact(text):
                self._spread(tensor.reshape(-1).view(torch.uint8), source)
        return tensor

    @contextmanager
    def _contact(self, text: str) -> Iterator[None]:
        """Turn a broken connection into the error that caused it: the failure of a peer, or its absence."""
        if self._closed:
            raise BackendError(f"expected an open backend for {text}, got a closed one; call connect() again")
        if (failure := self._board.known()) is not None:  # not `first_failure`, which reads the store
            raise headers.mark_shared(failure)
        number = 1 if self.last_contact is None else self.last_contact.number + 1
        contact = self.last_contact = Contact(number, text, time.monotonic())
        try:
            yield
            contact.ended = time.monotonic()
        except DisttrainError:
            raise
        except RuntimeError as error:
            if (failure := self.first_failure()) is not None:
                raise headers.mark_shared(failure) from error
            raise headers.mark_shared(
                BackendError(
                    f"rank {self.rank} of {self.world_size} lost its peers in {text}: a peer died, was killed or did "
                    f"not call it within the timeout; read the log of that peer. The network's error: {error}"
                )
            ) from error


def _refusal(check: Callable[[], None]) -> Exception | None:
    """Return the error of an argument check; it is raised after all ranks have received it."""
    try:
        check()
    except (TypeError, ValueError) as error:
        return error
    return None


def _pickled(value: object) -> tuple[bytes, Exception | None]:
    """Return `value` as a pickle, and the error if it cannot be pickled."""
    try:
        return pickle.dumps(value), None
    except Exception as error:  # noqa: BLE001 - a __reduce__ of the user's may raise anything
        refused = TypeError(f"collectives take tensors and picklable values, got {describe_value(value)}: {error}")
        refused.__cause__ = error
        return b"", refused


def _unpickled(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301 - written by a rank of the same run


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
