"""`python -m disttrain.launch` and `python -m disttrain` run the commands `launch` and `main`."""

import runpy
import sys

import pytest

from disttrain.commands import launch, main
from disttrain.version import __version__


def run_module(name: str, *arguments: str) -> int:
    """Run a module as `python -m` does, in this process; return its exit code."""
    sys.modules.pop(name, None)
    sys.argv[:] = ["replaced by runpy", *arguments]
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])


@pytest.mark.parametrize("module", ["disttrain.launch", "disttrain"])
def test_both_modules_print_the_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module(module, "--version") == 0
    assert capsys.readouterr().out == f"disttrain {__version__}\n"


@pytest.mark.parametrize(
    ("module", "arguments", "command"),
    [
        ("disttrain.launch", ["no-such-cfg.py", "--check"], launch.main),
        ("disttrain", ["launch", "no-such-cfg.py", "--check"], main.main),
        ("disttrain", ["compare", "no-such-run", "no-such-run"], main.main),
    ],
)
def test_output_and_exit_code_are_those_of_the_command(
    module: str, arguments: list[str], command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_module(module, *arguments)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("ConfigError: ")
    assert command(arguments) == code  # type: ignore[operator]
    assert capsys.readouterr().err == printed.err
