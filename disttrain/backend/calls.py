"""What the ranks tell each other at the start of a collective, and what follows when they differ.

*Contract*: a header is exactly `HEADER_BYTES` long whatever it says, so that gathering headers is one and
the same operation in every collective: ranks that call different things still meet. It holds a status,
a digest of the whole description of the call, the description (cut where it is long) and the first
`ROOM_BYTES` of a payload.

*Errors*, in this order: a body failed on some rank (`FAILED`): that rank re-raises, the others raise
RemoteError of the lowest; descriptions differ: BackendError everywhere; an argument was refused (`REFUSED`):
as for a failed body.
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
    """What a rank says about itself: all is well, an argument is wrong, the body of a context raised."""

    OK = 0
    REFUSED = 1
    FAILED = 2


@dataclass(frozen=True)
class Header:
    """One rank's header: as it is sent, or as it was received (`text` and `payload` may then be cut)."""

    text: str
    status: Status = Status.OK
    payload: bytes = b""
    payload_bytes: int = 0
    digest: bytes = b""


def describe(value: object) -> str:
    """Return a value's kind as headers and messages show it: `float32[3, 2]`, `int`, `str`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind.__name__
    return type(value).__name__


def describe_error(error: BaseException) -> str:
    """Return an error as other ranks will read it: its type and its message."""
    return f"{type(error).__name__}: {error}"


def cut(text: str, num_bytes: int) -> bytes:
    """Encode `text` in at most `num_bytes`, marking where it was cut."""
    encoded = text.encode(errors="backslashreplace")
    return encoded if len(encoded) <= num_bytes else encoded[: num_bytes - 3] + b"..."


def encode(text: str, payload: bytes = b"", status: Status = Status.OK) -> Tensor:
    """Return the header of a call as uint8[HEADER_BYTES]."""
    shown = cut(text, _TEXT_BYTES)
    digest = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=16).digest()
    raw = _LAYOUT.pack(status, len(shown), len(payload), digest) + shown + payload[:ROOM_BYTES]
    return torch.frombuffer(bytearray(raw.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def decode(header: Tensor) -> Header:
    """Return what `encode` wrote."""
    raw = header.numpy().tobytes()
    status, text_bytes, payload_bytes, digest = _LAYOUT.unpack_from(raw)
    start = _LAYOUT.size + text_bytes
    text = raw[_LAYOUT.size : start].decode(errors="replace")
    room = min(payload_bytes, ROOM_BYTES)
    return Header(text, Status(status), raw[start : start + room], payload_bytes, digest)


def compare(headers: Sequence[Header], error: BaseException | None) -> None:
    """Raise on every rank if the ranks' calls differ or one has an error; `error` is this rank's own."""
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
    passed = "; ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {text}" for text, ranks in ranks_by_text.items()
    )
    return BackendError(
        f"expected the same call on every rank, got {passed}; "
        "make every rank call the same collectives in the same order with arguments of one kind"
    )


def mark_shared(error: BaseException) -> BaseException:
    """Mark an error as one that every rank has heard of, and return it."""
    setattr(error, _SHARED, True)
    return error


def is_shared(error: BaseException | None) -> bool:
    """Return whether every rank has heard of this error or of one that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if getattr(error, _SHARED, False):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
