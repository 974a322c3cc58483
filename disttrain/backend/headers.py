"""The header that each rank sends at the start of a collective, and the errors that follow when headers differ.

*Contract*: every header is exactly `HEADER_BYTES` long. So every collective begins with the same gather, and ranks that
call different collectives still exchange their headers. A header holds a status, a digest of the whole description of
the call, the description (cut if it is long) and the first `ROOM_BYTES` of a payload.

*Errors*, in this order. A body failed on some rank (`FAILED`): that rank raises its error again, and the others raise
the RemoteError of the lowest such rank. The descriptions differ: BackendError on every rank. A rank refused an argument
(`REFUSED`): as for a failed body.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from disttrain.errors import BackendError, RemoteError

HEADER_BYTES = 1024
_TEXT_BYTES = 240
_LAYOUT = struct.Struct(">BHI16s")
ROOM_BYTES = HEADER_BYTES - _LAYOUT.size - _TEXT_BYTES

_SHARED = "_disttrain_known_to_all_ranks"


class Status(IntEnum):
    """The state of a rank at a collective: in order, an argument is wrong, the body of a context raised."""

    OK = 0
    REFUSED = 1
    FAILED = 2


@dataclass(frozen=True)
class Header:
    """The header of one rank. In a received header `text` and `payload` may be cut."""

    text: str
    status: Status = Status.OK
    payload: bytes = b""
    payload_bytes: int = 0
    digest: bytes = b""


def describe_value(value: object) -> str:
    """Return the kind of a value for headers and messages: `float32[3, 2]`, `int`, `str`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind.__name__
    return type(value).__name__


def describe_error(error: BaseException) -> str:
    """Return an error as text for the other ranks: its type and its message."""
    return f"{type(error).__name__}: {error}"


def encode_text(text: str, num_bytes: int) -> bytes:
    """Return `text` in at most `num_bytes`; a text that had to be cut ends in "..."."""
    encoded = text.encode(errors="backslashreplace")
    return encoded if len(encoded) <= num_bytes else encoded[: num_bytes - 3] + b"..."


def encode_header(text: str, payload: bytes = b"", status: Status = Status.OK) -> Tensor:
    """Return the header of a call as uint8[HEADER_BYTES]."""
    shown = encode_text(text, _TEXT_BYTES)
    digest = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=16).digest()
    raw = _LAYOUT.pack(status, len(shown), len(payload), digest) + shown + payload[:ROOM_BYTES]
    return torch.frombuffer(bytearray(raw.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def decode_header(header: Tensor) -> Header:
    """Return the header that `encode_header` wrote."""
    raw = header.numpy().tobytes()
    status, text_bytes, payload_bytes, digest = _LAYOUT.unpack_from(raw)
    start = _LAYOUT.size + text_bytes
    text = raw[_LAYOUT.size : start].decode(errors="replace")
    room = min(payload_bytes, ROOM_BYTES)
    return Header(text, Status(status), raw[start : start + room], payload_bytes, digest)


def compare_headers(headers: Sequence[Header], error: BaseException | None) -> None:
    """Raise on every rank if the ranks' calls differ or a rank has an error; `error` is this rank's own."""
    differ = len({header.digest for header in headers}) > 1
    for status in (Status.FAILED, Status.REFUSED):
        ranks = [rank for rank, header in enumerate(headers) if header.status == status]
        if status == Status.REFUSED and differ:
            raise mark_shared(_mismatch(headers))
        if ranks and error is not None:
            raise mark_shared(error)
        if ranks:
            message = headers[ranks[0]].payload.decode(errors="replace")
            raise mark_shared(RemoteError(ranks[0], message))


def _mismatch(headers: Sequence[Header]) -> BackendError:
    ranks_by_text: dict[str, list[str]] = {}
    for rank, header in enumerate(headers):
        ranks_by_text.setdefault(header.text, []).append(str(rank))
    calls = "; ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {text}" for text, ranks in ranks_by_text.items()
    )
    return BackendError(
        f"expected the same call on every rank, got {calls}; "
        "make every rank call the same collectives in the same order with arguments of one kind"
    )


def mark_shared(error: BaseException) -> BaseException:
    """Mark an error as one that every rank has received, and return it."""
    setattr(error, _SHARED, True)
    return error


def is_shared(error: BaseException | None) -> bool:
    """Return whether every rank has received this error or an error that caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if getattr(error, _SHARED, False):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
