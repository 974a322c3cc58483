"""A program of the package begins again with the settings of a run, once, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.process import CONFLICTING, SETTINGS, kernel_variables

PROGRAM = """
import json, os, sys
before = os.getpid(), sys.argv[1:]
{first}
from disttrain.process import begin_process, differences_of_process
begin_process()
child = "import os; print(hash('owl'), os.environ['NUMBA_NUM_THREADS'])"
import subprocess
told = [hash("owl"), os.getpid(), sys.argv[1:], sorted(os.environ), len(differences_of_process())]
print(json.dumps([*told, subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout]))
print("begun", file=sys.stderr)
"""


def started(folder: Path, *options: str, name: str = "disttrain", first: str = "", **variables: str) -> list[object]:
    """Run the program in an interpreter of its own under these variables; return its report and its process id."""
    import json

    path = folder / name
    path.write_text(PROGRAM.format(first=first))
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS} | variables
    process = subprocess.Popen(
        [sys.executable, *options, str(path), "two words", "x=1"], env=environment, stdout=-1, stderr=-1, text=True
    )
    out, err = process.communicate(timeout=60)
    assert err == "begun\n"  # once: the program that begins again had not come so far
    return [*json.loads(out), process.pid]


def test_every_start_has_the_same_settings_whatever_was_set(tmp_path: Path) -> None:
    starts = [
        started(tmp_path),
        started(tmp_path, PYTHONHASHSEED="11", OMP_NUM_THREADS="7", MKL_DOMAIN_NUM_THREADS="MKL_BLAS=3"),
        started(tmp_path, PYTHONHASHSEED="0", OPENBLAS_NUM_THREADS="2", OMP_THREAD_LIMIT="1"),
    ]
    for number, arguments_got, names, child in [(s[1], s[2], s[3], s[5]) for s in starts]:
        assert number in [s[-1] for s in starts]  # the process that was started, not a child of it
        assert arguments_got == ["two words", "x=1"]
        assert set(SETTINGS) <= set(names)  # type: ignore[call-overload]
        assert not {*CONFLICTING, "DISTTRAIN_BEGUN_AGAIN"} & set(names)  # type: ignore[call-overload]
        assert str(child).split() == [str(starts[0][0]), "1"]
    assert len({s[0] for s in starts}) == 1  # the hash of a text


def test_an_interpreter_that_ignores_its_variables_does_not_begin_for_ever(tmp_path: Path) -> None:
    package = Path(__file__).parents[1]
    report = started(tmp_path, "-E", first=f"sys.path.insert(0, {str(package)!r})", PYTHONHASHSEED="0")
    assert report[4] == 1  # what is not as in other processes is known


@pytest.mark.parametrize("name", ["notebook.py", "disttrain"])
def test_a_program_that_has_done_something_else_is_not_run_again(tmp_path: Path, name: str) -> None:
    loaded = "sys.modules['torch'] = sys" if name == "disttrain" else ""  # as in a notebook in which torch was used
    report = started(tmp_path, name=name, first=loaded, PYTHONHASHSEED="5", OMP_NUM_THREADS="4")
    assert report[4] == 2
    assert str(report[5]).split()[0] != str(report[0])  # its children are those of a run all the same


def test_variables_that_choose_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    before = kernel_variables()
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    assert sorted({*kernel_variables()} - {*before}) == ["MKL_CBWR=AVX2"]
