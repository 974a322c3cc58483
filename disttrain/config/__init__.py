"""Config: what a cfg.py declares; loading it, `key=value` overrides, and what a run keeps of it.

*Contract*: frozen and typed; unknown fields are refused; reading a cfg.py builds nothing, since its parts are
functions. The same config has the same description and hash on every rank, process and machine.

*Errors*: ConfigError alone, whose message a person can act on: what was expected, what was got, the nearest name.
"""

from disttrain.config.checks import check_devices, check_slots
from disttrain.config.describe import JSON, Description, config_hash, describe
from disttrain.config.fields import (
    CheckpointConfig,
    Config,
    LedgerConfig,
    LogConfig,
    Origin,
    ValidateConfig,
    replace,
    with_num_slots,
)
from disttrain.config.load import load_config
from disttrain.config.overrides import apply_overrides, settable
from disttrain.config.reference import FieldRow, field_table, reference_markdown
from disttrain.config.stored import Difference, Stored, blocking_differences, differences, from_json, to_json

__all__ = [
    "JSON",
    "CheckpointConfig",
    "Config",
    "Description",
    "Difference",
    "FieldRow",
    "LedgerConfig",
    "LogConfig",
    "Origin",
    "Stored",
    "ValidateConfig",
    "apply_overrides",
    "blocking_differences",
    "check_devices",
    "check_slots",
    "config_hash",
    "describe",
    "differences",
    "field_table",
    "from_json",
    "load_config",
    "reference_markdown",
    "replace",
    "settable",
    "to_json",
    "with_num_slots",
]
