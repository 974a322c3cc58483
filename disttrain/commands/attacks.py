"""Attacks of `disttrain verify`: every life gets other surroundings, and the setting that matters is found and named.

*Contract*: the reference has the working directory, the temporary directory, the time zone, the umask and the start
method of this process. Every other life has others, which depend on its number alone. `setting_that_matters` names only
a setting for which it has seen both: with this setting as in the reference all is well, and with it changed it is not.

Not varied: HOME and the host name (data and caches are found by them), the locale (few are installed everywhere).
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from disttrain.commands.scenarios import Life, Scenario
from disttrain.launching.interpreter import Surroundings

REFERENCE = Surroundings()
TIME_ZONES = ("<-0930>+09:30", "<+0545>-05:45")
UMASKS = (0o007, 0o077)


class Setting(NamedTuple):
    """A setting of a process's surroundings: the field of `Surroundings`, its name for a person, and what to do."""

    field: str
    name: str
    advice: str


ATTACKED = (
    Setting(
        "start_method",
        "the start method of loader workers (multiprocessing.set_start_method)",
        "A forked worker inherits the variables of modules; a spawned one imports the modules anew, so what they draw "
        "or count at import is another. Keep data in the dataset object, and make the dataset from functions and "
        "classes that have a name in a module.",
    ),
    Setting(
        "working_directory",
        "the working directory",
        'Find files from Path(__file__).parent in the cfg.py, not from os.getcwd() or a relative path such as "data/".',
    ),
    Setting(
        "temporary_directory",
        "the temporary directory (TMPDIR)",
        "Something is read from a file there that an earlier process left, or the path itself is used.",
    ),
    Setting(
        "time_zone",
        "the time zone (TZ)",
        "Give datetime.fromtimestamp() a time zone, and use time.gmtime() in place of time.localtime().",
    ),
    Setting("umask", "the umask", "Something reads the permissions of files that it has written."),
    Setting(
        "hash_seed",
        "the hash seed (PYTHONHASHSEED)",
        "Sets of strings have another order in each process, and hash() of a string another value: use sorted() or "
        "dict.fromkeys() in place of the set, and hashlib in place of hash().",
    ),
    Setting(
        "threads",
        "the number of threads of numeric libraries (OMP_NUM_THREADS and the like)",
        "A library sums in another order with another number of threads. Set its number in the code that calls it, for "
        "example by threadpoolctl.",
    ),
)
"""The likeliest come first. The last two are replaced by a life's launcher: they matter where something evades it."""


def attacked(scenarios: Sequence[Scenario], folder: Path) -> list[Scenario]:
    """Return the scenarios with surroundings for each life, those of the reference first.

    The folders of a life are made in `folder`, whose path should be short: sockets are made in them.
    """
    number, result = 0, []
    for scenario in scenarios:
        lives = []
        for life in scenario.lives:
            lives.append(dataclasses.replace(life, surroundings=surroundings_of(number, folder)))
            number += 1
        result.append(dataclasses.replace(scenario, lives=tuple(lives)))
    return _with_start_method(result)


def surroundings_of(number: int, folder: Path) -> Surroundings:
    """Return the surroundings of the life with this number; 0 is the reference."""
    if number == 0:
        return REFERENCE
    return Surroundings(
        hash_seed=1000 + number,
        threads=2 + number % 2,
        working_directory=folder / f"cwd-{number}",
        temporary_directory=folder / f"tmp-{number}",
        time_zone=TIME_ZONES[number % 2],
        umask=UMASKS[number % 2],
    )


def _with_start_method(scenarios: list[Scenario]) -> list[Scenario]:
    """Give one life another start method: each worker that is spawned imports torch, for seconds.

    That life is the first with workers of the last scenario that has such a life. It is usually a resumed one.
    """
    method = "spawn" if multiprocessing.get_start_method() != "spawn" else "fork"
    for place, scenario in reversed(list(enumerate(scenarios[1:], start=1))):
        numbers = [number for number, life in enumerate(scenario.lives) if life.num_workers]
        if numbers:
            lives = list(scenario.lives)
            life = lives[numbers[0]]
            assert life.surroundings is not None
            changed = dataclasses.replace(life.surroundings, start_method=method)
            lives[numbers[0]] = dataclasses.replace(life, surroundings=changed)
            scenarios[place] = dataclasses.replace(scenario, lives=tuple(lives))
            break
    return scenarios


def settings_changed_in(scenario: Scenario) -> list[Setting]:
    """Return the settings that a life of the scenario has otherwise than the reference."""
    each = [life.surroundings for life in scenario.lives if life.surroundings is not None]
    return [
        setting
        for setting in ATTACKED
        if any(getattr(surroundings, setting.field) != getattr(REFERENCE, setting.field) for surroundings in each)
    ]


def as_in_reference(life: Life, settings: Sequence[Setting]) -> Life:
    """Return a life that has these settings as the reference has them."""
    if life.surroundings is None:
        return life
    values = {setting.field: getattr(REFERENCE, setting.field) for setting in settings}
    return dataclasses.replace(life, surroundings=dataclasses.replace(life.surroundings, **values))


def setting_that_matters(changed: Sequence[Setting], is_wrong: Callable[[Sequence[Setting]], bool]) -> Setting | None:
    """Return the setting because of which something is wrong; None if it is wrong with none of them changed.

    All of `changed` together are known to be wrong. `is_wrong(settings)` tries it with these settings changed alone.
    """
    if not changed or is_wrong(()):
        return None
    good, bad = 0, len(changed)  # with the first `good` settings changed all is well, with the first `bad` it is not
    while bad - good > 1:
        size = (good + bad) // 2
        good, bad = (good, size) if is_wrong(changed[:size]) else (size, bad)
    return changed[bad - 1]


def values_in(scenario: Scenario, setting: Setting) -> str:
    """Return the values of a setting in a scenario's lives, for a person."""
    values = [getattr(life.surroundings, setting.field) for life in scenario.lives]
    return ", ".join(dict.fromkeys(shown_value(value, setting) for value in values))


def shown_value(value: object, setting: Setting) -> str:
    """Return the value of a setting for a person; None is the one with which verify was started."""
    if value is None:
        return "yours"
    return f"{value:03o}" if setting.field == "umask" else str(value)
