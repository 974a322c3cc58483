"""A run that does not fit into memory: refused or warned before its first step, and explained when it dies of it.

*Contract*: before the first step the rows that are known are compared with the memory of the device, or of the host
that its ranks share. More than all of it is refused, on every rank; more than `TIGHT` of it is a warning. An error of
memory in a step becomes an `OutOfMemory` with the table of the rank that failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.errors import ConfigError, OutOfMemory
from disttrain.files import count_bytes
from disttrain.handlers.progress import warn
from disttrain.mistakes import placed
from disttrain.run.memory_table import TIGHT, counts, device_text, is_out_of_memory, known_memory, limit_of
from disttrain.run.state import Run


def check_memory(run: Run, console: Console) -> None:
    """Refuse or warn of a run whose known rows do not fit; every rank calls this."""
    if not counts(run.backend.device):
        return
    with run.backend.agree("comparing the run with the memory"):
        table = known_memory(run)
        share = table.share
        if share is not None and share > 1:
            raise ConfigError(
                f"the run needs more memory than there is, even without activations.\n{table.text()}\n"
                "see docs/memory.md"
            )
    if share is not None and share > TIGHT:
        warn(console, f"the run hardly fits into the memory.\n{table.text()}")


@contextmanager
def told_of_memory(run: Run) -> Iterator[None]:
    """Turn an error of memory in the `with` body into an `OutOfMemory` with the table of this rank."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        table = known_memory(run).text(advises=True)
        raise OutOfMemory(f"rank {run.backend.rank} has no memory left: {placed(error)}\n{table}") from error


@contextmanager
def told_of_memory_while_building(config: Config, backend: Backend) -> Iterator[None]:
    """As `told_of_memory`, while there is no run whose rows could be told."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        limit = limit_of(backend.device)
        has = "" if limit is None else f", which has {count_bytes(limit)}"
        raise OutOfMemory(
            f"rank {backend.rank} has no memory left while model, optimizer and data are built on "
            f"{device_text(backend.device)}{has}: {placed(error)}; use fewer ranks on this host, a smaller model, or a "
            "device with more memory (docs/memory.md)"
        ) from error
