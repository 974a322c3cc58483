"""The groups of fields of a Config, such as `checkpoint`.

*Contract*: that of `fields`: a group is frozen, refuses unknown fields, and its docstrings are its texts in --help.
"""

from typing import Annotated, ClassVar, Literal

from disttrain.config.annotations import (
    Collate,
    FieldNote,
    Flag,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)
from disttrain.config.declaration import Declaration


class CheckpointConfig(Declaration):
    """The times at which checkpoints are saved, their place, and the number that is kept."""

    prefix: ClassVar[str] = "checkpoint."
    every_steps: Annotated[NonNegative, FieldNote("steps", may_change=True, harmless=True)] = 0
    """Steps from one checkpoint to the next. 0: save at the end of each epoch."""
    every_s: Annotated[NonNegativeFloat, FieldNote("s", may_change=True, harmless=True)] = 0.0
    """Also save as soon as the last checkpoint is this old. 0: never."""
    keep: Annotated[Positive, FieldNote("checkpoints", may_change=True, harmless=True)] = 3
    """The number of newest checkpoints to keep."""
    anchor_every_steps: Annotated[NonNegative, FieldNote("steps", may_change=True, harmless=True)] = 0
    """Also save at each multiple of so many steps, and never remove these checkpoints. Any step can then be computed
    again from an anchor before it (docs/replay.md). Each takes the space of a checkpoint. 0: no anchors."""
    monitor: Annotated[str | None, FieldNote(may_change=True, harmless=True)] = None
    """Also keep the checkpoint with the best result on the validation data. The result is "loss", or the name of a
    metric, or with `mode` of a value that `forward` returns; with several sets "clean/loss". None: keep no best
    checkpoint."""
    mode: Annotated[Literal["auto", "min", "max"], FieldNote(may_change=True, harmless=True)] = "auto"
    """Whether the smallest or the largest value of `monitor` is the best. "auto": the smallest loss; for a metric, its
    own `higher_is_better` decides."""
    asynchronous: Annotated[Flag, FieldNote(may_change=True, harmless=True)] = False
    """Write checkpoints in the background, while training continues. This needs host memory for a second copy of the
    saved state, spread over all ranks."""
    leave_out_frozen: Annotated[Flag, FieldNote(may_change=True, harmless=True)] = False
    """Leave parameters without `requires_grad` out of checkpoints, as long as they are what `model` and `init_from`
    give. A resumed run gets them from there again, and compares their hashes (docs/starting.md)."""
    target: Annotated[str | None, FieldNote(may_change=True, harmless=True)] = None
    """The folder or the fsspec URL that holds the checkpoints, in a subfolder NAME/. None: the run directory."""


class LogConfig(Declaration):
    """The reports of a running training, and how often they come."""

    prefix: ClassVar[str] = "log."
    every_steps: Annotated[Positive, FieldNote("steps", may_change=True, harmless=True)] = 10
    """Steps from one fetch of the losses to the next. Ledger, curves and progress line get new values then."""
    every_s: Annotated[PositiveFloat, FieldNote("s", may_change=True, harmless=True)] = 10.0
    """Time from one progress line to the next, if the output is not a terminal."""
    tensorboard: Annotated[Flag | Literal["auto"], FieldNote(may_change=True, harmless=True)] = "auto"
    """Also write the curves for TensorBoard. "auto": if TensorBoard is installed."""


class LedgerConfig(Declaration):
    """The evidence that a run writes about the result of each step."""

    prefix: ClassVar[str] = "ledger."
    every_steps: Annotated[Positive, FieldNote("steps", may_change=True, harmless=True)] = 100
    """Steps from one hash of batch, parameters and optimizer state to the next, in the ledger."""


class AuditConfig(Declaration):
    """The audit of steps: each slot is computed again by another rank, to find hardware that computes wrong bits."""

    prefix: ClassVar[str] = "audit."
    every_steps: Annotated[NonNegative, FieldNote("steps", may_change=True, harmless=True)] = 0
    """Steps from one audited step to the next. In such a step each slot is computed by two ranks, and hashes of its
    gradient are compared before the update; a rank that computes wrong bits is named (docs/audit.md). On one rank the
    same rank computes again, which finds transient faults alone. 0: no audit."""


class ValidateConfig(Declaration):
    """The times at which the validation data is evaluated, and the batches in which it is."""

    prefix: ClassVar[str] = "validate."
    every_steps: Annotated[NonNegative, FieldNote("steps", may_change=True, harmless=True)] = 0
    """Steps from one evaluation to the next. 0: evaluate at the end of each epoch."""
    batch_size: Annotated[Positive | None, FieldNote("samples", may_change=True)] = None
    """The number of samples in a batch of the evaluation; each batch lies on one rank. None: as many as in a slot of
    the training. Another number may round the values otherwise."""
    collate: Annotated[Collate | None, FieldNote(takes="(samples) -> batch")] = None
    """Makes a batch of the evaluation from a list of samples, if `collate` does what only a training wants, such as
    mixup; torch.utils.data.default_collate is torch's own. None: `collate` makes these batches too."""


class EarlyStopConfig(Declaration):
    """The early end of a run whose results on the validation data no longer improve."""

    prefix: ClassVar[str] = "early_stop."
    monitor: Annotated[str | None, FieldNote(may_change=True)] = None
    """End the run when this result on the validation data no longer improves: "loss", the name of a metric, or with
    `mode` of a value that `forward` returns. None: the run goes on to its last step."""
    patience: Annotated[Positive, FieldNote("evaluations", may_change=True)] = 3
    """The number of evaluations in a row without an improvement after which the run ends."""
    mode: Annotated[Literal["auto", "min", "max"], FieldNote(may_change=True)] = "auto"
    """Whether small or large values of `monitor` are good. "auto": a small loss; for a metric, its own
    `higher_is_better` decides."""
    min_delta: Annotated[NonNegativeFloat, FieldNote(may_change=True)] = 0.0
    """A value improves if it is better than the best so far by more than this."""


class EmaConfig(Declaration):
    """An exponential moving average (EMA) of the weights."""

    prefix: ClassVar[str] = "ema."
    decay: Annotated[Fraction | None, FieldNote()] = None
    """Keep an exponential moving average of the weights: the part of the average that stays at each update. None: no
    average."""
    every_steps: Annotated[Positive, FieldNote("steps")] = 1
    """Steps of the optimizer from one update of the average to the next."""
    evaluate: Annotated[Flag, FieldNote()] = True
    """Evaluate the average, and not the weights that are trained. Then `checkpoint.monitor`, `early_stop`, metrics and
    `disttrain checkpoint export` see the average."""
