"""Fingerprints of what the ranks send each other in an audited step, to hold what was sent against what arrived.

*Contract*: each piece of a reduction has three: of the sender when the piece was made, of the sender after it was sent,
of the receiver when it had arrived. If the first two differ, the sender's buffer was changed; if only the last differs,
the piece was changed on its way, by the sender, the receiver or what lies between them.

*Cost*: three passes over the sent gradients in an audited step, where they lie; one wait for the device at its end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from disttrain.parallel.audit_verdicts import Fault
from disttrain.parallel.fingerprints import fetched, fingerprint_by_place

Prints = Mapping[tuple[int, str, int], Sequence[int]]
"""Of one rank: by (number of the exchange, "made", "sent" or "arrived", the other rank) the pieces' fingerprints."""


class SentPieces:
    """The pieces that one rank sends and receives in a step."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, str, int], list[Tensor]] = {}
        self._num_exchanges = 0

    def begins(self, messages: Sequence[Any]) -> int:
        """Note what is about to be sent by `messages` (operation, tensor, other rank); return the exchange's number."""
        self._num_exchanges += 1
        self._note(self._num_exchanges, messages, {dist.isend: "made"})
        return self._num_exchanges

    def ends(self, number: int, messages: Sequence[Any]) -> None:
        """Note what was sent and what has arrived, before anything is computed with it."""
        self._note(number, messages, {dist.isend: "sent", dist.irecv: "arrived"})

    def _note(self, number: int, messages: Sequence[Any], kinds: Mapping[Any, str]) -> None:
        for operation, data, peer in messages:
            if operation in kinds:
                self._pieces.setdefault((number, kinds[operation], peer), []).append(fingerprint_by_place(data))

    def prints(self) -> Prints:
        """Return the fingerprints as plain numbers."""
        numbers = iter(fetched([each for pieces in self._pieces.values() for each in pieces]))
        return {key: [next(numbers) for _ in pieces] for key, pieces in self._pieces.items()}


def exchange_faults(by_rank: Sequence[Prints]) -> list[Fault]:
    """Return the faults that show between what was made, what was sent and what arrived; `by_rank` has all ranks'."""
    found: dict[Fault, None] = {}
    for sender, prints in enumerate(by_rank):
        for (number, kind, receiver), made in prints.items():
            if kind != "made":
                continue
            if prints[number, "sent", receiver] != made:
                found[Fault("the gradients that it sent", (sender,), "transient")] = None
            elif by_rank[receiver][number, "arrived", sender] != made:
                what = f"the gradients on their way from rank {sender} to rank {receiver}"
                found[Fault(what, (sender, receiver), "transient")] = None
    return list(found)
