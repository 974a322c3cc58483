"""`disttrain launchers`: list the launchers that are installed with the package, or copy them to a folder.

The repository keeps them in `launch/`. A wheel holds that folder as `disttrain/launchers/`, so there is one source; in
an editable installation it is the folder of the repository itself.

*Contract*: nothing is overwritten. A file that is there already with the same content is left as it is; with another
content it stops the command before anything is written. Exit code 0: done; 2: the command cannot be run.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from disttrain.commands.exit_codes import COMPLETED, USAGE
from disttrain.config.wording import did_you_mean
from disttrain.errors import ConfigError
from disttrain.files import printable

_PACKAGE = Path(__file__).parents[1]
_FIRST_SENTENCE = re.compile(r'(?:#!.*\n)?(?:#|""")\s*(.+)')
"""The first line of a script's, manifest's or program's comment, in its group 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = launchers_parser().parse_args(arguments)
    try:
        if options.action == "copy":
            copy_launchers(options.dir, options.names)
        else:
            list_launchers()
    except (ConfigError, OSError) as error:
        print(f"{type(error).__name__}: {printable(str(error))}", file=sys.stderr)
        return USAGE
    return COMPLETED


def launchers_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain launchers",
        description="List the launchers that are installed with disttrain: what starts a run on a cluster, by the "
        "cluster's own means. `copy` copies them to a folder, to be changed.",
        epilog="exit codes: 0: done; 2: the command cannot be run",
    )
    actions = parser.add_subparsers(dest="action", metavar="copy")
    copy = actions.add_parser("copy", help="copy launchers to a folder", description="Copy launchers to a folder.")
    copy.add_argument("dir", metavar="DIR", type=Path, help="the folder; it is made if it is missing")
    copy.add_argument("names", metavar="NAME", nargs="*", help="launchers, such as slurm (default: all)")
    return parser


def launchers_folder() -> Path:
    """Return the folder of the installed launchers: one folder each."""
    for folder in (_PACKAGE / "launchers", _PACKAGE.parent / "launch"):
        if folder.is_dir():
            return folder
    raise ConfigError("expected the launchers beside the package, got none; install disttrain again")


def installed() -> dict[str, list[Path]]:
    """Return the files of each launcher by its name."""
    folders = sorted(path for path in launchers_folder().iterdir() if path.is_dir() and path.name[0] not in "._")
    return {folder.name: sorted(path for path in folder.iterdir() if path.is_file()) for folder in folders}


def list_launchers() -> None:
    """Print each file of each launcher, with the first line of what it says about itself."""
    for name, files in installed().items():
        print(name)
        for file in files:
            found = _FIRST_SENTENCE.match(file.read_text())
            print(f"  {file.name:<20}  {found[1] if found else ''}".rstrip())
    print("\ndisttrain launchers copy DIR [NAME ...]   copies them to a folder")


def copy_launchers(to: Path, names: Sequence[str]) -> None:
    """Copy launchers to a folder; ConfigError, before anything is written, if it holds other files of their names."""
    known = installed()
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or f"; expected some of {', '.join(known)}"
            raise ConfigError(f"{name!r} is no launcher{near}")
    wanted = [file for name in names or known for file in known[name]]
    for file in wanted:
        target = to / file.parent.name / file.name
        if target.exists() and (not target.is_file() or target.read_bytes() != file.read_bytes()):
            raise ConfigError(f"{target} is there with another content; remove it, or choose another folder")
    for name in names or known:
        (to / name).mkdir(parents=True, exist_ok=True)
    for file in wanted:
        target = to / file.parent.name / file.name
        shutil.copyfile(file, target)
        if file.read_bytes()[:2] == b"#!":  # an archive may have lost the mark
            target.chmod(0o755)
        print(target)
