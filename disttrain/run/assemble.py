"""Make a `Run` of a Config and a Backend, on every rank alike.

The config's way: `Config` -> `assemble` -> `Run` -> `train`. Each part is built once, from the parts above it:

    precision -> data -> model -> strategy, weights to begin with -> optimizer, schedule -> gradients, updates
              -> trainer -> evaluation -> Run

*Contract*: what can fail on one rank alone is agreed on by all before any rank acts (`backend.agree`). Data and model
are built from seeds of their own, so they are the same on every rank. Nothing is written here. The config's handlers
are called last, with the complete run.

*Errors*: ConfigError, with the file and line, for anything that a factory of the config raises.
"""

from functools import partial

from disttrain.backend import Backend, set_cpu_threads
from disttrain.config import Config, check_devices
from disttrain.data.weighted import weight_of
from disttrain.devices import device_row
from disttrain.engine.supervised import StepFunction
from disttrain.errors import ConfigError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.parallel import Slots, World, strategy_for
from disttrain.parallel.strategies import Strategy
from disttrain.run.builders import build_model, build_step_function
from disttrain.run.data import build_data
from disttrain.run.directory import RunDirectory
from disttrain.run.ema import EMA, build_ema
from disttrain.run.factories import build
from disttrain.run.freezing import Freezing
from disttrain.run.frozen_weights import FrozenWeights
from disttrain.run.initial_weights import InitialWeights, Taken
from disttrain.run.length import total_steps
from disttrain.run.measures import build_evaluation
from disttrain.run.module_settings import ModuleSettings
from disttrain.run.monitors import build_best, build_early_stop
from disttrain.run.pretrained import pretrained_position
from disttrain.run.state import Run
from disttrain.run.stepping import build_stepping, choose
from disttrain.run.validation_sets import evaluations_of


def assemble(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    left_out: dict[int, str],
    initial: InitialWeights | None = None,
) -> Run:
    """Build every part of a run and call the config's handlers.

    `left_out`: steps to leave out, and the reasons. `initial`: weights that the model takes.
    """
    slots = slots_of(config, backend)
    with backend.agree("choosing the precision"):
        precision = choose(config, backend)
    with backend.agree("building the data"):
        data = build_data(config, slots, backend)
    with backend.agree("building the model"):
        step_function = build_step_function(config, build_model(config, backend), backend)
    strategy, taken = spread_model(config, step_function, slots, backend, initial)
    layout = strategy.layout
    num_steps = total_steps(config, data.identity)
    stepping = build_stepping(config, step_function, strategy, slots, precision, backend, num_steps, left_out)
    with backend.agree("building the average of the weights and the metrics"):
        ema = build_ema(config, step_function, stepping.optimizer, stepping.updates, backend)
        parts = (step_function, stepping.optimizer, ema, slots, layout, stepping.precision, backend)
        evaluation = evaluations_of(data.valid, lambda each, field: build_evaluation(config, each, *parts, field))
        best, early_stop = build_best(config, evaluation, backend), build_early_stop(config, evaluation)
    run = Run(
        config=config,
        backend=backend,
        directory=directory,
        slots=slots,
        step_function=step_function,
        layout=layout,
        optimizer=stepping.optimizer,
        schedule=stepping.schedule,
        precision=stepping.precision,
        gradients=stepping.gradients,
        updates=stepping.updates,
        slot_results=stepping.slot_results,
        freezing=Freezing(step_function, stepping.optimizer, layout, forgotten=stepping.forgotten),
        loader=data.loader,
        trainer=stepping.trainer,
        evaluation=evaluation,
        best=best,
        early_stop=early_stop,
        ema=ema,
        audited=stepping.audited,
        bad_steps=None if config.on_nan == "skip" else BadSteps(config.spike_factor),
        data=data.identity,
        valid_data=data.valid,
        taken=taken,
    )
    complete(run)
    return run


def spread_model(
    config: Config, step_function: StepFunction, slots: Slots, backend: Backend, initial: InitialWeights | None
) -> tuple[Strategy, Taken | None]:
    """Spread the model over the ranks and let it take the weights to begin with; return the strategy and the report."""
    is_lazy = device_row(backend.device).is_lazy  # its layouts take a model that has its values
    taken = initial.take(step_function, backend) if initial is not None and is_lazy else None
    with backend.agree("spreading the model over the ranks"):
        strategy = strategy_for(config.strategy, step_function, world_of(config, slots, backend))
    if initial is not None and not is_lazy:
        taken = initial.take(step_function, backend, strategy.layout)
    return strategy, taken


def complete(run: Run) -> None:
    """Call the config's handlers with the assembled run, and note what they have not changed yet."""
    follows = bool(run.config.handlers) or run.updates.follows_values or run.early_stop is not None
    run.begin = None if run.taken is None else run.taken.begin
    run.evaluated.is_followed = run.evaluation is not None and follows
    if run.ema is not None:
        run.keep(EMA, run.ema)
    call_handlers(run)
    run.settings = ModuleSettings(run.step_function)
    run.pretrained = pretrained_position(run.model)
    run.frozen = FrozenWeights(run.parts, run.layout, run.backend, leaves_out=run.config.checkpoint.leave_out_frozen)


def slots_of(config: Config, backend: Backend) -> Slots:
    """Return the slots of the run; ConfigError unless this rank's devices divide them."""
    if config.num_slots is None:
        raise ConfigError("num_slots is not resolved; expected a number here, as disttrain.launch gives it")
    check_devices(config.global_batch_size, config.num_slots, backend.num_devices, config.validate.batch_size)
    return Slots(config.num_slots, backend.rank, backend.world_size)


def call_handlers(run: Run) -> None:
    """Call the config's handlers, and note which functions they attach to the trainer."""
    with run.backend.agree("calling the handlers"):
        for handler in run.config.handlers:
            name = str(getattr(handler, "__name__", type(handler).__name__))
            before = run.trainer.registrations()
            build(f"handler {name}", handler, run.trainer, run)
            added = [each for each in run.trainer.registrations() if each not in before]
            run.attached.append((name, handler))
            run.attached.extend((name, partial(each.function, *each.args, **each.kwargs)) for each in added)
        run.freezing.assembled(run.kept)
    run.updates.checks.append(run.freezing.check)
    set_cpu_threads(run.config.cpu_threads)  # again: a factory may have set the number of the machine's cores


def world_of(config: Config, slots: Slots, backend: Backend) -> World:
    """Return the ranks and devices over which a strategy spreads the model."""
    return World(
        slots=slots,
        device=backend.device,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        num_devices=backend.num_devices,
        reduction=config.reduction,
        fsdp_gather=config.fsdp_gather,
        weight_of=None if config.weight is None else weight_of,
        rehearses=config.deterministic and config.precision != "apex",  # apex moves its loss scale in a backward
    )
