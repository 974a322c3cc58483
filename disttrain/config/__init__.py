"""WHAT a run is: the Config that a cfg.py declares, the overrides of it, and the copy that a run keeps.

    fields       `Config` and its fields
    groups       the groups of fields, such as `checkpoint`
    declaration  the base of `Config` and of its groups: frozen, with errors of our own
    init_from    the group `init_from`, and its short form
    updates      several updates in one step
    update_checks  the rules for them, and the settings that exclude them
    annotations  the types of the fields, and the notes that a field carries beside its type
    asked        the parts of a run that a function asks for by the names of its arguments
    checks       the rules between fields: one length, one loss, slots that divide the global batch
    monitors     the rules for the fields that follow a result of the evaluations
    load         makes a Config from a cfg.py or from a run directory
    overrides    applies `key=value` from the command line to a Config
    parse        reads the text after `key=` as a value
    describe     writes a Config as plain JSON values, and hashes them
    stored       writes and reads config.json, and compares the config of a resumed run with it
    reference    makes the table of all fields, for --help and for docs/reference/config.md
    wording      the phrases of the error messages

| noun        | meaning                                                                              |
|-------------|--------------------------------------------------------------------------------------|
| field       | one setting of a Config, such as `seed`                                              |
| group       | several fields under one name, such as `checkpoint`                                  |
| leaf        | a field with its dotted name, such as `checkpoint.keep`                              |
| note        | the unit of a field, whether a resumed run may change it, the form of its function   |
| override    | a text `key=value`; the key is a leaf, or a keyword of a function: `optimizer.lr`    |
| description | a Config as one flat dict, from dotted names to JSON values                          |
| origin      | the file and the overrides from which a Config was loaded                            |

*Contract*: a Config is frozen and typed. Unknown fields are refused. Reading a cfg.py builds nothing, because its
parts are functions. A config has the same description and hash on every rank, in every process, on every machine.

*Errors*: ConfigError only. Its message gives what was expected, what was got, and the nearest name.
"""

from disttrain.config.checks import check_devices, check_slots
from disttrain.config.describe import JSON, Description, config_hash, describe
from disttrain.config.fields import Config, Origin, replace, with_num_slots
from disttrain.config.groups import (
    CheckpointConfig,
    EarlyStopConfig,
    EmaConfig,
    LedgerConfig,
    LogConfig,
    ValidateConfig,
)
from disttrain.config.init_from import InitFromConfig
from disttrain.config.load import load_config
from disttrain.config.overrides import apply_overrides, settable
from disttrain.config.reference import FieldRow, field_table, reference_markdown
from disttrain.config.stored import (
    FieldDifference,
    Stored,
    binding_fields,
    blocking_differences,
    differences,
    differences_that_matter,
    read_stored,
    to_json,
)
from disttrain.config.updates import Update

__all__ = [
    "JSON",
    "CheckpointConfig",
    "Config",
    "Description",
    "EarlyStopConfig",
    "EmaConfig",
    "FieldDifference",
    "FieldRow",
    "InitFromConfig",
    "LedgerConfig",
    "LogConfig",
    "Origin",
    "Stored",
    "Update",
    "ValidateConfig",
    "apply_overrides",
    "binding_fields",
    "blocking_differences",
    "check_devices",
    "check_slots",
    "config_hash",
    "describe",
    "differences",
    "differences_that_matter",
    "field_table",
    "load_config",
    "read_stored",
    "reference_markdown",
    "replace",
    "settable",
    "to_json",
    "with_num_slots",
]
