"""The declaration of a Config: its fields. Those that belong together are groups (`groups`).

*Contract*: a Config is frozen, and unknown fields are refused. The docstring below a field is its text in --help and
in docs/reference/config.md. Its annotation gives the unit, and whether a resumed run may have another value. A Config
holds functions that build the parts of a run: making a Config builds nothing.

*Errors*: ConfigError with one line for each problem: the field, what was expected, what was got, and the nearest name
if a field is unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from disttrain.config.annotations import (
    AboveOne,
    BackendName,
    Classes,
    Collate,
    DataFactory,
    FieldNote,
    Flag,
    Forward,
    Handler,
    Integer,
    Loss,
    LossOfEmbeddings,
    MetricFactory,
    ModelFactory,
    NonNegative,
    OptimizerFactory,
    OrderFactory,
    Positive,
    PositiveFloat,
    PrecisionFactory,
    ScheduleFactory,
    Weight,
)
from disttrain.config.checks import problems
from disttrain.config.declaration import Declaration
from disttrain.config.groups import (
    AuditConfig,
    CheckpointConfig,
    EarlyStopConfig,
    EmaConfig,
    LedgerConfig,
    LogConfig,
    ValidateConfig,
)
from disttrain.config.init_from import InitFromConfig, from_short_form
from disttrain.config.updates import Update, needed_without_updates, updates_by_name
from disttrain.config.wording import sentence
from disttrain.errors import ConfigError

STEP_PARTS = ("loss", "global_loss", "forward")
"""The fields beside `model` whose Modules an optimizer may ask for."""


@dataclass(frozen=True)
class Origin:
    """The source of a loaded Config: its file, the name of its module, the overrides, the folder of its imports.

    `folder` is the folder of the original cfg.py, also if the copy in a run directory was loaded.
    """

    file: Path
    module: str
    overrides: tuple[str, ...]
    folder: Path
    text: bytes = field(default=b"", repr=False, compare=False)
    """The content of the file when it was run; the file may change while the run goes on."""
    modules_before: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """The modules that had been imported before the file was run."""


class Config(Declaration):
    """All settings of one run."""

    _origin: Origin | None = PrivateAttr(default=None)

    name: Annotated[str | None, FieldNote(harmless=True)] = None
    """The name of the run. Its directory is runs/NAME. None: the name of the cfg.py, without ".py"."""
    seed: Annotated[Integer, FieldNote()] = 0
    """The seed of the run. All other seeds are derived from it."""
    model: Annotated[ModelFactory, FieldNote(takes="() -> Module")]
    """Builds the model. Every rank calls it under the same seed."""
    train_data: Annotated[DataFactory, FieldNote(takes="() -> Dataset or iterable")]
    """Builds the training data. Its samples are pairs (x, y), unless `forward` is set. docs/streams.md describes data
    that can only be iterated. A dict of datasets is mixed by `order`."""
    valid_data: Annotated[DataFactory | Mapping[str, DataFactory] | None, FieldNote(takes="() -> Dataset")] = None
    """Builds the validation data, or several sets of it by name: {"clean": f, "noisy": g}. The values of a set are
    called clean/loss, clean/accuracy and so on. None: no validation."""
    order: Annotated[OrderFactory | None, FieldNote(takes="(data, seed, global_batch_size) -> Order")] = None
    """Builds the order of the training data: a class of `disttrain.data`, such as Sequential, partial(Weighted, ...),
    partial(LengthBuckets, ...) or partial(Mixture, ...), or one of your own (docs/order.md). None: each epoch is
    shuffled."""
    loss: Annotated[Loss | None, FieldNote(takes="(y_pred, y) -> scalar Tensor")] = None
    """Computes the mean loss of a microbatch, from the output of the model and the target. None if `forward` is set."""
    forward: Annotated[Forward | None, FieldNote(takes="(model, batch) -> (loss, outputs[, values])")] = None
    """Computes the loss and the outputs of a microbatch that is not a pair (x, y), in place of loss(model(x), y). It
    may also return values for the curves, a dict of name: number (docs/metrics.md). With `global_loss`: its
    embeddings."""
    global_loss: Annotated[LossOfEmbeddings | None, FieldNote(takes="(embeddings) -> scalar Tensor")] = None
    """Computes the loss of a whole global batch, for losses that compare its samples with each other (contrastive
    ones). `forward` then returns a microbatch's embeddings: a tensor, or a dict or tuple of tensors, with one row for
    each sample. They are given with the rows of all slots, the same on every rank (docs/contrastive.md). None: the loss
    is a mean over the slots."""
    weight: Annotated[Weight | None, FieldNote(takes="(batch) -> int")] = None
    """The number of targets in a batch, such as tokens or boxes, over which its loss is the mean. Then gradients and
    losses are means over all targets of the global batch, and a batch of weight 0 counts for nothing. None: every slot
    counts once."""
    init_from: Annotated[InitFromConfig, BeforeValidator(from_short_form)] = InitFromConfig()
    updates: Annotated[Mapping[str, Update], BeforeValidator(updates_by_name), FieldNote()] = Field(
        default_factory=dict
    )
    """Several updates in one step, in place of `forward`, `optimizer`, `schedule` and `grad_clip_norm`: a list of
    disttrain.Update(name, parameters, forward, optimizer), for a GAN or an actor and a critic (docs/updates.md). With
    `valid_data`, `loss` or `forward` is what an evaluation computes. On the command line: updates.d.grad_clip_norm=1,
    updates.d.optimizer.lr=1e-4."""
    optimizer: Annotated[
        OptimizerFactory | None,
        BeforeValidator(needed_without_updates),
        FieldNote(takes="(parameters) -> Optimizer", asks=("model", *STEP_PARTS)),
    ] = Field(default=None, validate_default=True)
    """Builds the optimizer, for example partial(torch.optim.AdamW, lr=1e-3). It is required unless there are `updates`,
    each of which has its own. A function with an argument `model` gets
    the model instead of the parameters, to make groups of them (docs/optimizers.md); with `loss`, `global_loss` or
    `forward`, that field's Module too."""
    schedule: Annotated[ScheduleFactory | None, FieldNote(takes="(optimizer, total_steps) -> LRScheduler")] = None
    """Builds the schedule of the learning rate. It steps once after each step of the optimizer. One whose step needs
    `metrics` (ReduceLROnPlateau) steps after each evaluation, with the result that `schedule_monitor` names. None: no
    schedule."""
    schedule_monitor: Annotated[str | None, FieldNote(may_change=True)] = None
    """The result on the validation data that a schedule like ReduceLROnPlateau follows: "loss", the name of a metric,
    or of a value that `forward` returns; with several sets "clean/loss". It stays the same for the life of a run. None:
    what `checkpoint.monitor` names when the run begins, or "loss"."""
    metrics: Annotated[Mapping[str, MetricFactory], FieldNote(takes="() -> Metric", within="dict of name: ")] = Field(
        default_factory=dict
    )
    """The metrics of the validation data: for each name a function that builds one, such as a class of torchmetrics."""
    train_metrics: Annotated[
        Mapping[str, MetricFactory],
        FieldNote(takes="() -> Metric", within="dict of name: ", may_change=True, harmless=True),
    ] = Field(default_factory=dict)
    """The metrics of the training data, of the same form as `metrics`. They are computed every `log.every_steps` steps
    and at the end of each epoch, over the outputs of all slots since the last time (docs/metrics.md)."""
    global_batch_size: Annotated[Positive, FieldNote("samples")]
    """The number of samples in one step, over all ranks."""
    num_slots: Annotated[Positive | None, FieldNote("slots")] = None
    """The number of equal parts, called slots, of the global batch. Each rank needs at least one; it runs several one
    after the other and adds up their gradients, so more slots than ranks are gradient accumulation. None: the world
    size of the first launch."""
    max_epochs: Annotated[Positive | None, FieldNote("epochs")] = None
    """The length of the run in epochs. Set either this or `max_steps`. A resumed run may change it, unless there is a
    schedule."""
    max_steps: Annotated[Positive | None, FieldNote("steps")] = None
    """The length of the run in steps. Set either this or `max_epochs`. A resumed run may change it, unless there is a
    schedule."""
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "apex", "auto"]
        | Annotated[PrecisionFactory, FieldNote(takes="(device) -> Precision")],
        FieldNote(),
    ] = "fp32"
    """The numbers of forward and backward: a name, or a function that builds a precision of your own. "auto": bf16 on
    an accelerator that has it, else fp32."""
    tf32: Annotated[Flag, FieldNote()] = False
    """Let CUDA round the inputs of float32 matrix products and convolutions to 10 bits of mantissa. This is faster and
    less exact."""
    strategy: Annotated[Literal["ddp", "fsdp"], FieldNote(may_change=True)] = "ddp"
    """The distribution of the model. "ddp": each rank holds all of it. "fsdp": each rank holds a shard of it
    (docs/fsdp.md). Both give the same bits."""
    fsdp_gather: Annotated[Literal["step", "module"], FieldNote(may_change=True, harmless=True)] = "step"
    """The time for which strategy="fsdp" gathers parameters. "step": all for a whole step, so a forward may use them as
    it likes. "module": each module's for its own forward and backward, if every rank has one slot; this takes less
    memory."""
    reduction: Annotated[Literal["invariant", "fast"], FieldNote()] = "invariant"
    """The sum of the gradients over the ranks. "invariant": it has the same bits on any number of ranks. "fast": one
    plain collective makes it, and the bits depend on the number of ranks."""
    grad_clip_norm: Annotated[PositiveFloat | None, FieldNote()] = None
    """The largest norm of the whole gradient. A larger gradient is scaled down to it. None: no limit."""
    num_workers: Annotated[NonNegative, FieldNote("processes", may_change=True, harmless=True)] = 0
    """The number of processes that load data, for each rank. 0: the rank loads its data itself."""
    collate: Annotated[Collate | None, FieldNote(takes="(samples) -> batch")] = None
    """Makes a batch from a list of samples, in the training and, unless `validate.collate` is set, in the evaluation.
    None: torch's default_collate."""
    backend: Annotated[BackendName, FieldNote(may_change=True, harmless=True)] = "auto"
    """The way in which ranks communicate. "auto": xla on a TPU; else single without a launcher; else nccl with CUDA and
    gloo on CPUs."""
    spmd: Annotated[Flag, FieldNote(may_change=True)] = False
    """Let one rank drive all XLA devices of a host. Each slot is cut over them. On XLA, strategy="fsdp" always does
    this."""
    cpu_threads: Annotated[Positive, FieldNote("threads")] = 1
    """The number of threads with which torch computes on the CPU, on each rank. Another number gives other bits, so a
    resumed run must keep it. Other numeric libraries have one thread; so has the loading of data."""
    deterministic: Annotated[Flag, FieldNote(may_change=True)] = True
    """Refuse operations that have no deterministic kernel, samples that vary under one seed, and a forward whose
    gradients vary in a second run of a process's first slot. False: warn and continue; the bits may differ each time.
    """
    activation_checkpointing: Annotated[Classes, FieldNote(may_change=True, harmless=True)] = False
    """The classes of modules, such as ("Block",), that keep their inputs alone and run again in the backward. This
    takes less memory and more time, and changes no bit. True: the blocks that an nn.ModuleList or an nn.Sequential
    holds. On the command line: Block, or Block,Head."""
    compile: Annotated[Flag, FieldNote()] = False
    """Compile the model with torch.compile."""
    handlers: Annotated[
        Sequence[Handler],
        AfterValidator(tuple),
        FieldNote(takes="(trainer, run) -> None", within="list of ", may_change=True, harmless=True),
    ] = ()
    """Functions that are called once, before the first step. Each can attach handlers to the engine."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    ledger: LedgerConfig = LedgerConfig()
    audit: AuditConfig = AuditConfig()
    validate: ValidateConfig = ValidateConfig()  # type: ignore[assignment]  # see _Hidden
    early_stop: EarlyStopConfig = EarlyStopConfig()
    ema: EmaConfig = EmaConfig()
    on_nan: Annotated[Literal["stop", "skip", "rollback"], FieldNote(may_change=True)] = "stop"
    """The reaction to a loss or gradient that is not finite. "stop": end the run. "skip": leave out an update whose
    gradient is not finite. "rollback": go back to a checkpoint and continue without that step."""
    spike_factor: Annotated[AboveOne | None, FieldNote(may_change=True)] = None
    """Treat a loss above this many times the median of the last 64 losses like a loss that is not finite. None: accept
    such losses."""
    timeout_s: Annotated[PositiveFloat, FieldNote("s", may_change=True, harmless=True)] = 300.0
    """The longest time that a rank may take for one batch, one step or one batch of an evaluation. After that the run
    stops."""
    accept_other_data: Annotated[Flag, FieldNote(may_change=True)] = False
    """Resume even if the length, the fingerprint or the compared samples of the data have changed."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if lines := list(problems(self)):
            raise ConfigError("\n".join(map(sentence, lines)))
        return self

    @property
    def origin(self) -> Origin | None:
        """The source of a loaded Config; None if no file declares it."""
        return self._origin


def replace(config: Config, **changes: Any) -> Config:
    """Return a copy with other values, checked as a whole. A group such as `checkpoint` is replaced as a whole."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return with_origin(type(config)(**{**given, **changes}), config.origin)


def with_num_slots(config: Config, num_slots: int) -> Config:
    """Return a copy with the number of slots that the first launch of the run has set."""
    return replace(config, num_slots=num_slots)


def with_origin(config: Config, origin: Origin | None) -> Config:
    """Return a copy with `origin` set."""
    copy = config.model_copy()
    copy._origin = origin
    return copy
