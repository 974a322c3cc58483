"""The moments at which `Checkpoint` is called: which of them a run can resume from, and what an exception allows.

*Contract*: an engine's state counts an iteration before its update is made. So a state that is saved inside an
iteration resumes with other bits, and a UserWarning says what is lost. So does one without the trainer's loss scale. An
exception may be one rank's alone, and the others then wait for it in a collective. So it is reported to them, which
wakes them, and no rank waits for another.
"""

import logging
import warnings
from collections.abc import Iterable

from torch.amp.grad_scaler import GradScaler

from disttrain.checkpoint.agree import CheckpointRanks
from disttrain.engine import Engine, Events

logger = logging.getLogger(__name__)

_INSTEAD = "To resume with the same bits, save at ITERATION_COMPLETED or EPOCH_COMPLETED"


def warn_of_open_iteration(objects: Iterable[object], exception: BaseException | None) -> None:
    """Warn if an engine of these objects is inside an iteration; `exception` is what EXCEPTION_RAISED passed."""
    for engine in objects:
        if not isinstance(engine, Engine):
            continue
        event = engine.last_event_name if exception is None else engine.raised_after
        number = engine.state.iteration
        if event == Events.ITERATION_STARTED:
            told = (
                f"a checkpoint inside iteration {number} counts that iteration, whose update is not made: a run that "
                f"resumes from it goes on with iteration {number + 1}"
            )
        elif event == Events.GET_BATCH_COMPLETED or (event == Events.GET_BATCH_STARTED and exception is not None):
            told = (
                f"a checkpoint inside the fetch of the batch of iteration {number + 1} has the random numbers of that "
                "fetch behind it: a run that resumes from it fetches the batch again, with others"
            )
        else:
            continue
        warnings.warn(f"{told}. {_INSTEAD}", UserWarning, stacklevel=5)


def warn_of_scaler(objects: Iterable[object]) -> None:
    """Warn if an engine of these objects has a gradient scaler that is not one of them."""
    for engine in objects:
        scaler = getattr(engine.state, "scaler", None) if isinstance(engine, Engine) else None
        if isinstance(scaler, GradScaler) and all(each is not scaler for each in objects):
            warnings.warn(
                "the checkpoint holds no trainer.state.scaler: a run that resumes from it begins with a new loss "
                "scale, and has other bits. Add it to to_save",
                UserWarning,
                stacklevel=6,
            )


def saves_alone(backend: CheckpointRanks, exception: BaseException, save_handler: object, save_on_rank: int) -> bool:
    """Report an exception to the other ranks; return whether this rank saves, without them.

    Afterwards no collective works on any rank.
    """
    fail = getattr(backend, "fail", None)
    if callable(fail):
        fail(exception)
    if not getattr(save_handler, "every_rank", False):
        return backend.rank == save_on_rank
    logger.error(
        "no checkpoint is saved after this exception: its save handler needs all ranks, and they may be at different "
        "points. Resume from the newest one; a save handler without a backend lets one rank save alone"
    )
    return False
