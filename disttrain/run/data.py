"""The data of a run: training data with its loader and identity, and validation data.

*Contract*: each factory is called under the data's own seed, so every rank builds the same data. The identity
(length and fingerprint) is part of every checkpoint: a resumed run must have the same data.

*Errors*: ConfigError or DataError for data that cannot be loaded by position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.config.wording import got
from disttrain.data import (
    SlotBatchSampler,
    SlotLoader,
    StreamLoader,
    check_dataset,
    check_stream,
    copies_for,
    is_iterable_style,
)
from disttrain.data.sources import Sources, is_sources
from disttrain.data.weighted import WeightedCollate
from disttrain.engine.step_defaults import to_device
from disttrain.errors import ConfigError
from disttrain.evidence import batch_hash
from disttrain.parallel import Slots
from disttrain.run.factories import build
from disttrain.run.validation_sets import NamedSets
from disttrain.seeding import manual_seed, seed_for


@dataclass(frozen=True)
class RunData:
    """The data of a run: the loader of the training data, its length and fingerprint, and the validation data."""

    loader: SlotLoader | StreamLoader
    identity: dict[str, Any]
    valid: Any
    """The validation data: a Dataset, several by name (`NamedSets`), or None."""


def build_data(config: Config, slots: Slots, backend: Backend) -> RunData:
    """Build training and validation data under the data's own seed."""
    manual_seed(seed_for(config.seed, "data"))
    dataset = with_names(config, build("train_data", config.train_data))
    valid = build_valid_data(config)
    return RunData(*loader_of(config, dataset, slots, backend), valid)


def with_names(config: Config, dataset: Any) -> Any:
    """Return the training data; a dict of datasets as one dataset, whose sources have the names of the dict."""
    if not is_sources(dataset):
        return dataset
    if config.order is None:
        raise ConfigError(
            f"train_data: expected a dataset, got a dict of {len(dataset)} ({', '.join(map(repr, dataset))}); return "
            "one of them, or mix them: order=partial(Mixture, shares={...}) with a share for each (docs/order.md)"
        )
    return Sources(dataset)


def build_valid_data(config: Config) -> Any:
    """Build the validation data, each set under the data's own seed; None without."""

    def built(field: str, factory: Callable[[], Any]) -> Any:
        manual_seed(seed_for(config.seed, "data"))  # again: it may cut one data set as the training data does
        dataset = build(field, factory)
        if is_sources(dataset):
            raise ConfigError(
                f"{field}: expected a function that returns one dataset, got a dict of {len(dataset)} from it; for "
                f"several sets give a function for each: valid_data={{{next(iter(dataset))!r}: FUNCTION, ...}}"
            )
        return dataset

    if isinstance(config.valid_data, Mapping):
        sets = {name: built(f"valid_data.{name}", factory) for name, factory in config.valid_data.items()}
        return NamedSets(sets)
    return None if config.valid_data is None else built("valid_data", config.valid_data)


def collate_of(config: Config, *, evaluates: bool = False) -> Callable[[list[Any]], Any] | None:
    """Return the function that makes a batch of samples: with `weight`, one that computes the batch's weight too."""
    collate = config.validate.collate or config.collate if evaluates else config.collate
    return collate if config.weight is None else WeightedCollate(config.weight, collate)


def loader_of(
    config: Config, dataset: Any, slots: Slots, backend: Backend
) -> tuple[SlotLoader | StreamLoader, dict[str, Any]]:
    """Return the loader of the training data, and what identifies that."""
    size, num_slots = config.global_batch_size, slots.num_slots
    copies = copies_for(backend.device, to_device)
    if not is_iterable_style(dataset):
        data = check_dataset(dataset, "train_data")
        order = None if config.order is None else build("order", config.order, dataset, config.seed, size)
        sampler = SlotBatchSampler(len(dataset), size, num_slots, seed=config.seed, slots=slots.mine, order=order)
        slot_loader = SlotLoader(
            dataset,
            sampler,
            num_workers=config.num_workers,
            collate_fn=collate_of(config),
            pin_memory=copies is not None,
            copies=copies,
        )
        return slot_loader, {**data, **sampler.order_identity}
    if config.order is not None:
        raise ConfigError(
            f"order: expected None for training data that can only be iterated ({type(dataset).__name__}), got "
            f"{got(config.order)}; let its __iter__ decide about the order, or give it a __getitem__ and a __len__"
        )
    data = check_stream(dataset, "train_data")
    if config.max_epochs is not None and (data["dataset_length"] or 0) < size:
        length = f"with a length of {data['dataset_length']}" if data["dataset_length"] else "without a length"
        raise ConfigError(
            f"max_epochs={config.max_epochs}: expected training data of a known length, at least global_batch_size="
            f"{size} samples, got a stream {length} ({type(dataset).__name__}); say where the run ends by max_steps, "
            "with max_epochs=none, or give it a __len__(self)"
        )
    loader = StreamLoader(
        dataset,
        size,
        num_slots,
        seed=config.seed,
        slots=slots.mine,
        ranks=backend,
        num_workers=config.num_workers,
        collate_fn=collate_of(config),
        digest=batch_hash,
        accept_other_data=config.accept_other_data,
        pin_memory=copies is not None,
    )
    return loader, {**data, "shards": num_slots if loader.sharded else None}
