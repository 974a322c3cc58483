"""Refuses collectives in the user's code, whose result would depend on the ranks, while it computes a slot.

*Contract*: it counts the collectives of the ranks' common process group, torch's default one, in the body of a `with`.
Only code of the user's may run there. On one rank there is nothing to call; groups of the user's own are not seen.

*Errors*: ConfigError on every rank that called one.

*Cost*: two reads of a counter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError


@contextmanager
def without_collectives(process_group: ProcessGroup | None, where: str, advice: str) -> Iterator[None]:
    """Raise ConfigError after the body, which is `where`, if it called a collective; `advice` says what to do."""
    before = _num_collectives(process_group)
    yield
    if (num := _num_collectives(process_group) - before) > 0:
        calls = "a collective" if num == 1 else f"{num} collectives"
        raise ConfigError(f"{where}: expected no call of torch.distributed, got {calls}; leave it out: {advice}")


def _num_collectives(process_group: Any) -> int:
    if process_group is None or process_group.size() == 1:
        return 0
    try:
        return int(process_group._get_sequence_number_for_group())
    except RuntimeError:  # a process group that does not count
        return 0
