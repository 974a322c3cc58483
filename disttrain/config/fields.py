"""What a cfg.py declares: `Config`, its fields and their groups.

Contract: frozen; unknown fields are refused; the line below a field says what it means, its annotation the
unit and whether a resumed run may have another value. A Config holds factories: making one builds nothing.

*Errors*: ConfigError with one line a problem: field, expected, got, and the nearest name for an unknown one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from disttrain.config.annotations import (
    About,
    AboveOne,
    Collate,
    DataFactory,
    Flag,
    Forward,
    Handler,
    Integer,
    Loss,
    MetricFactory,
    ModelFactory,
    NonNegative,
    NonNegativeFloat,
    OptimizerFactory,
    Positive,
    PositiveFloat,
    PrecisionFactory,
    ScheduleFactory,
)
from disttrain.config.checks import problems
from disttrain.config.wording import explain, sentence
from disttrain.errors import ConfigError


class _NotThere:
    """Takes pydantic's deprecated `BaseModel.validate` away, so that a field can have the name."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError("validate")


class Declaration(BaseModel):
    """A frozen group of fields whose validation raises ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ignored_types=(_NotThere,))
    prefix: ClassVar[str] = ""

    if not TYPE_CHECKING:  # a type checker makes the constructor from the fields
        validate = _NotThere()

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(explain(error, type(self), self.prefix)) from None


class CheckpointConfig(Declaration):
    """When checkpoints are written, where, and how many are kept."""

    prefix: ClassVar[str] = "checkpoint."
    every_steps: Annotated[NonNegative, About("steps", may_change=True)] = 0
    """From one checkpoint to the next; 0: at the end of each epoch."""
    every_s: Annotated[NonNegativeFloat, About("s", may_change=True)] = 0.0
    """Also after this much time since the last checkpoint; 0: no."""
    keep: Annotated[Positive, About("checkpoints", may_change=True)] = 3
    """How many of the newest are kept."""
    monitor: Annotated[str | None, About(may_change=True)] = None
    """A metric, or "loss": the checkpoint with the best value on the validation data is kept too; None: no."""
    mode: Annotated[Literal["auto", "min", "max"], About(may_change=True)] = "auto"
    """Which value of `monitor` is the best; "auto": the smallest loss, and what a metric says of itself."""
    asynchronous: Annotated[Flag, About(may_change=True)] = False
    """Write while the training goes on; over all ranks the host then holds a second copy of what is saved."""
    target: Annotated[str | None, About(may_change=True)] = None
    """A folder or a URL for fsspec, in which they lie under NAME/; None: the run directory."""


class LogConfig(Declaration):
    """What is reported while a run goes on, and how often."""

    prefix: ClassVar[str] = "log."
    every_steps: Annotated[Positive, About("steps", may_change=True)] = 10
    """From one fetching of the losses to the next."""
    every_s: Annotated[PositiveFloat, About("s", may_change=True)] = 10.0
    """From one progress line to the next where there is no terminal."""
    tensorboard: Annotated[Flag | Literal["auto"], About(may_change=True)] = "auto"
    """Also write the curves for TensorBoard; "auto": where it is installed."""


class LedgerConfig(Declaration):
    """What is kept as evidence of what each step computed."""

    prefix: ClassVar[str] = "ledger."
    every_steps: Annotated[Positive, About("steps", may_change=True)] = 100
    """From one hash of the batches, the parameters and the optimizer state to the next."""


class ValidateConfig(Declaration):
    """When the validation data is evaluated."""

    prefix: ClassVar[str] = "validate."
    every_steps: Annotated[NonNegative, About("steps", may_change=True)] = 0
    """From one evaluation to the next; 0: at the end of each epoch."""


@dataclass(frozen=True)
class Origin:
    """Where a Config was loaded from: the file, its module's name, the overrides, the folder of its neighbours.

    `folder` is the original cfg.py's also when a run directory's copy of it was loaded.
    """

    file: Path
    module: str
    overrides: tuple[str, ...]
    folder: Path


class Config(Declaration):
    """One run: what is trained on what, how, and what is kept of it."""

    _origin: Origin | None = PrivateAttr(default=None)

    name: Annotated[str | None, About()] = None
    """The run directory is runs/NAME; None: the stem of the cfg.py's name."""
    seed: Annotated[Integer, About()] = 0
    """The run's seed, from which every other seed is derived."""
    model: Annotated[ModelFactory, About(takes="() -> Module")]
    """Builds the model, on every rank from the same seed."""
    train_data: Annotated[DataFactory, About(takes="() -> Dataset or iterable")]
    """Builds the training data; its items are (x, y) unless `forward` says otherwise. An iterable: docs/streams.md."""
    valid_data: Annotated[DataFactory | None, About(takes="() -> Dataset")] = None
    """Builds the validation data; None: no validation."""
    loss: Annotated[Loss | None, About(takes="(y_pred, y) -> scalar Tensor")] = None
    """The mean loss of a microbatch; None where there is `forward`."""
    forward: Annotated[Forward | None, About(takes="(model, batch) -> (loss, outputs)")] = None
    """Replaces loss(model(x), y) for batches of another form."""
    optimizer: Annotated[OptimizerFactory, About(takes="(parameters) -> Optimizer")]
    """Builds the optimizer, such as partial(torch.optim.AdamW, lr=1e-3)."""
    schedule: Annotated[ScheduleFactory | None, About(takes="(optimizer, total_steps) -> LRScheduler")] = None
    """Builds the learning rate's schedule, stepped once a step."""
    metrics: Annotated[Mapping[str, MetricFactory], About(takes="() -> Metric", within="dict of name: ")] = Field(
        default_factory=dict
    )
    """Build the torchmetrics of the validation data."""
    global_batch_size: Annotated[Positive, About("samples")]
    """Samples a step, over all ranks."""
    num_slots: Annotated[Positive | None, About("slots")] = None
    """Equal parts of the global batch, at least one a rank; None: the first launch's world size."""
    max_epochs: Annotated[Positive | None, About("epochs")] = None
    """The run's length; a resumed run may change it where there is no schedule. This or max_steps."""
    max_steps: Annotated[Positive | None, About("steps")] = None
    """The run's length; a resumed run may change it where there is no schedule. This or max_epochs."""
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "apex", "auto"]
        | Annotated[PrecisionFactory, About(takes="(device) -> Precision")],
        About(),
    ] = "fp32"
    """The numbers in which forward and backward compute; "auto": bf16 where the device has it, else fp32."""
    tf32: Annotated[Flag, About()] = False
    """Let CUDA round the inputs of float32 matrix products and convolutions to 10 bits of mantissa, for speed."""
    strategy: Annotated[Literal["ddp", "fsdp"], About(may_change=True)] = "ddp"
    """How the model lies over the ranks: whole on each, or cut into shards (docs/fsdp.md); the same bits."""
    reduction: Annotated[Literal["invariant", "fast"], About()] = "invariant"
    """How gradients meet: the same bits on any world size, or one plain collective over the ranks' sums."""
    grad_clip_norm: Annotated[PositiveFloat | None, About()] = None
    """Largest norm of the whole gradient; None: any."""
    num_workers: Annotated[NonNegative, About("processes", may_change=True)] = 0
    """Loader processes a rank; 0: the rank loads its own data."""
    collate: Annotated[Collate | None, About(takes="(samples) -> batch")] = None
    """Makes a batch of a list of samples; None: torch's default."""
    backend: Annotated[Literal["auto", "single", "gloo", "nccl", "xla"], About(may_change=True)] = "auto"
    """How the ranks communicate; "auto": nccl with CUDA, else gloo under a launcher, else single."""
    spmd: Annotated[Flag, About(may_change=True)] = False
    """One rank drives all XLA devices of a host, each slot cut over them; on XLA strategy="fsdp" always does."""
    cpu_threads: Annotated[Positive, About("threads")] = 1
    """Threads a rank computes with on the CPU; they are part of the run, since another number gives other bits."""
    deterministic: Annotated[Flag, About(may_change=True)] = True
    """Refuse operations without a deterministic kernel; false: warn and go on, other bits each time."""
    compile: Annotated[Flag, About()] = False
    """Compile the model with torch.compile."""
    handlers: Annotated[
        Sequence[Handler],
        AfterValidator(tuple),
        About(takes="(trainer, run) -> None", within="list of ", may_change=True),
    ] = ()
    """Called once before the first step, to attach what you like to the engine."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    ledger: LedgerConfig = LedgerConfig()
    validate: ValidateConfig = ValidateConfig()  # type: ignore[assignment]  # see _NotThere
    on_nan: Annotated[Literal["stop", "skip", "rollback"], About(may_change=True)] = "stop"
    """Where a step's loss or gradient is not finite; "rollback": back to a checkpoint, and on without that step."""
    spike_factor: Annotated[AboveOne | None, About(may_change=True)] = None
    """A loss over this many times the median of the last 64 is treated like one that is not finite; None: no."""
    timeout_s: Annotated[PositiveFloat, About("s", may_change=True)] = 300.0
    """Longest time without progress of a rank (a batch, a step, a batch of an evaluation) before the run stops."""
    accept_other_data: Annotated[Flag, About(may_change=True)] = False
    """Resume although the dataset's length or fingerprint has changed."""

    @model_validator(mode="after")
    def _sound(self) -> "Config":
        if found := list(problems(self)):
            raise ConfigError("\n".join(map(sentence, found)))
        return self

    @property
    def origin(self) -> Origin | None:
        """Where it was loaded from; None for a Config that no file declares."""
        return self._origin


def replace(config: Config, **changes: Any) -> Config:
    """Return a copy with other values, checked as a whole; a group, such as `checkpoint`, is replaced whole."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return with_origin(type(config)(**{**given, **changes}), config.origin)


def with_num_slots(config: Config, num_slots: int) -> Config:
    """Return a copy with the number of slots that the run's first launch has settled."""
    return replace(config, num_slots=num_slots)


def with_origin(config: Config, origin: Origin | None) -> Config:
    """Return a copy that says where it came from."""
    copy = config.model_copy()
    copy._origin = origin
    return copy
