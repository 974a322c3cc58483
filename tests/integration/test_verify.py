"""`disttrain verify` and `disttrain compare` by their real commands: sound configs pass, and faults are found."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, Done, environment, launch, write_cfg

from disttrain.commands.main import main

WRONG = ROOT / "examples" / "not_deterministic"
PROGRAM = Path(sys.executable).with_name("disttrain")


def disttrain(*words: object, cwd: Path, timeout_s: float = 300) -> Done:
    """Run the installed command."""
    done = subprocess.run(
        [PROGRAM, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow  # the test of the README runs the same with another config
def test_a_sound_config_gives_the_same_bits_in_all_runs(tmp_path: Path) -> None:
    done = disttrain("verify", WRONG / "sound.py", "--worlds", "1,3", "--kills", 1, "--steps", 9, cwd=tmp_path)
    assert done.code == 0, done.text
    assert "the same bits in all 5 runs: at each of 9 steps" in done.out
    rows = [line.split() for line in done.out.splitlines() if re.search(r"\d s  ", line)]
    assert [row[0] for row in rows] == ["reference", "again", "3", "killed", "killed,"]
    assert [row[-1] for row in rows] == ["-", "yes", "yes", "yes", "yes"]
    assert len({row[-2] for row in rows}) == 1
    assert done.err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "worlds", "kills", "found_by", "headline"),
    [
        ("own_generator", "1", 0, "again", "step 1: the loaded data (slot 0, slot 1, slot 2, slot 3)"),
        pytest.param(
            "clock",
            "1",
            0,
            "again",
            "step 0: the state that the runs began with (model.0.weight, model.0.bias, ",
            marks=pytest.mark.slow,
        ),
        ("rank", "1,2", 0, "2 ranks", "step 1: the loss (slot 2, slot 3)"),
        pytest.param(
            "history",
            "1",
            1,
            "killed",
            r"step \d+: the loaded data (slot 0, slot 1, slot 2, slot 3)",
            marks=pytest.mark.slow,
        ),
        ("unsaved", "1", 1, "killed", r"step \d+: the loss (slot 0, slot 1, slot 2, slot 3)"),
        ("evaluation", "1", 0, "again", "step 6: the results of the evaluation after the step (loss): "),
    ],
)
def test_a_deliberate_fault_is_found_and_named(
    name: str,
    worlds: str,
    kills: int,
    found_by: str,
    headline: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--worlds", worlds, "--workers", "0", "--kills", str(kills), "--steps", "6", "--first", "--quick"]
    code = main(["verify", str(WRONG / f"{name}.py"), *words, "--keep", str(tmp_path / "kept")])
    output = capsys.readouterr()
    assert code == 1, output.out + output.err
    assert f"not the same bits: {found_by}\n" in output.out
    assert re.search(f"first difference at {headline}".replace("(", r"\(").replace(")", r"\)"), output.out), output.out
    explained = {"own_generator": "generator of its own", "history": "generator of its own", "clock": "the clock"}
    explained["evaluation"] = "the evaluation depends on something else"
    assert explained.get(name, "the forward pass or the loss depends on something else") in output.out
    if kills:
        # The difference is at the first step that was repeated after the kill, or later.
        killed_at = int(re.search(r"killed +1 +0 +(\d+)", output.out)[1])  # type: ignore[index]
        assert int(re.search(r"first difference at step (\d+)", output.out)[1]) <= killed_at  # type: ignore[index]
    assert (tmp_path / "kept" / "reference" / name / "ledger.jsonl").exists()


@pytest.mark.slow  # a new interpreter for each life
@pytest.mark.timeout(900)
def test_the_setting_of_the_process_that_matters_is_found_and_named(tmp_path: Path) -> None:
    words = ["--worlds", "1", "--workers", "0", "--kills", "1", "--steps", "6"]
    quick = disttrain("verify", WRONG / "time_zone.py", *words, "--quick", cwd=tmp_path)
    assert quick.code == 0, quick.text
    assert "--quick: all runs began in one process, so this does not show" in quick.out
    done = disttrain("verify", WRONG / "time_zone.py", *words, cwd=tmp_path, timeout_s=600)
    assert done.code == 1, done.text
    assert "first difference at step 1: the loaded data" in done.out
    assert "The cause is the time zone (TZ): <+0545>-05:45 in 'again', yours in the reference." in done.out
    assert [line.split()[-1] for line in done.out.splitlines() if " s  " in line] == ["-", "NO", "yes"]


NEEDS_ITS_FOLDER = """
from pathlib import Path
usual = fields["train_data"]
def from_here(): return usual() if Path("data.txt").exists() else open("data.txt")
fields["train_data"] = from_here
class Unsendable(usual):
    def __init__(self):
        super().__init__()
        self.local = lambda: 1
fields["valid_data"] = Unsendable
"""


@pytest.mark.slow  # a new interpreter for each life
@pytest.mark.timeout(900)
def test_a_run_that_needs_its_folder_or_forked_workers_is_told_so_and_verified(tmp_path: Path) -> None:
    cfg = write_cfg(tmp_path, NEEDS_ITS_FOLDER)
    (tmp_path / "data.txt").touch()
    words = ["--worlds", "1", "--workers", "0,1", "--kills", "1", "--steps", "6"]
    done = disttrain("verify", cfg, *words, cwd=tmp_path, timeout_s=600)
    assert done.code == 0, done.text
    assert "the same bits in all 5 runs" in done.out
    notes = [line for line in done.out.splitlines() if line.startswith("note: the run depends on ")]
    assert re.search(
        "on the working directory: .*'again' ended with: .*No such file or directory: 'data.txt'", notes[0]
    )
    assert re.search("on the start method of loader workers .*'killed, resized' ended with: .*pickle", notes[1])
    assert len(notes) == 2


def test_every_wrong_example_is_tried() -> None:
    tried = {getattr(case, "values", case)[0] for mark in MARKS for case in mark.args[1]}
    assert tried == {path.stem for path in WRONG.glob("*.py")} - {"sound", "time_zone"}


MARKS = [m for m in test_a_deliberate_fault_is_found_and_named.pytestmark if m.name == "parametrize"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.py"], "none.py: no such file"),
        (["."], ".: expected a cfg.py, got a folder; verify leaves run directories alone"),
        (["cfg.py", "--worlds", "9"], "num_slots=4 is too few for 9 ranks"),
        (["cfg.py", "--kills", "7", "--steps", "3"], "--kills 7: expected at most one kill for each of the 3 steps"),
        (["cfg.py", "optimiser.lr=1"], "did you mean optimizer.lr"),
        (["cfg.py", "--keep", "."], "--keep .: expected a new or empty folder"),
    ],
)
def test_a_command_that_cannot_verify_fails_at_once(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cfg(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *words]) == 2
    output = capsys.readouterr().err
    assert output.startswith("ConfigError: ")
    assert expected in output
    assert [path.name for path in tmp_path.iterdir()] == ["cfg.py"]


@pytest.mark.parametrize("option", [["--worlds", "0"], ["--worlds", "1,x"], ["--steps", "-1"], ["--kills", ""]])
def test_options_are_numbers(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "cfg.py", *option])
    assert ended.value.code == 2
    assert "expected a whole number from" in capsys.readouterr().err


def test_a_config_that_fails_while_running_is_reported_with_its_own_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = write_cfg(tmp_path, "def broken(): raise OSError('the disk of the model is gone')\nfields['model'] = broken")
    assert main(["verify", str(cfg), "--steps", "3", "--keep", str(tmp_path / "kept")]) == 2
    output = capsys.readouterr()
    assert "reference, on 1 rank with 0 workers: the ranks ended with 1, expected 0" in output.err
    assert "DisttrainError: model raised OSError: the disk of the model is gone" in output.err


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `runs/one` and `runs/two`, which differ in their learning rates."""
    folder = tmp_path_factory.mktemp("two_runs")
    write_cfg(folder)
    for name, rate in (("one", "1e-3"), ("two", "2e-3")):
        done = launch("cfg.py", f"name={name}", f"optimizer.lr={rate}", cwd=folder)
        assert done.code == 0, done.text
    return folder


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *names: str) -> tuple[int, str]:
    code = main(["compare", *(str(folder / "runs" / name) for name in names)])
    output = capsys.readouterr()
    return code, output.out + output.err


def test_compare_finds_the_first_difference_of_two_runs(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = compared(two_runs, capsys, "one", "two")
    assert code == 1
    assert "the configs differ in optimizer.lr: 0.001 and 0.002" in output
    assert "first difference at step 1: the learning rate: 0.001 (0x1.0624dd2f1a9fcp-10) and 0.002" in output
    assert "The same in this step: the choice of samples, the loss, the gradient's norm." in output


def test_compare_says_that_two_runs_are_the_same(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "runs" / "broken"
    shutil.copytree(two_runs / "runs" / "one", broken)
    shutil.copytree(two_runs / "runs" / "one", tmp_path / "runs" / "one")
    (broken / "result.json").unlink()
    text = (broken / "ledger.jsonl").read_text().splitlines(keepends=True)
    (broken / "ledger.jsonl").write_text("".join(text[:10]) + text[10][:20])
    code, output = compared(tmp_path, capsys, "one", "broken")
    assert code == 0
    assert "has 15 steps" in output
    assert "the same bits: 9 steps, the whole state at 3 of them" in output


def test_compare_refuses_a_folder_without_a_run(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = compared(two_runs, capsys, "one", "none")
    assert code == 2
    assert output.startswith("ConfigError: expected a run's ledger at ")


PAGE = (ROOT / "docs" / "verify.md").read_text()


def block(kind: str) -> list[str]:
    """Return the words of the page's only command of this kind, without `disttrain`."""
    (text,) = re.findall(rf"(?ms)^```bash {kind}\n(.*?)^```$", PAGE)
    program, *words = text.split()
    assert program == "disttrain"
    return list(words)


@pytest.mark.slow
def test_the_commands_of_the_page_have_the_output_that_it_shows(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    assert f"disttrain {' '.join(block('run'))}" in (ROOT / "README.md").read_text()  # whose test runs it
    assert main(block("fails")) == 1
    output = capsys.readouterr().out
    shown = re.search(r"(?ms)^```\n(not the same bits.*?)^```$", PAGE)
    assert shown is not None
    # The whole text except the two hashes, which differ each time.
    expected = re.sub(r": [0-9a-f]{16} and [0-9a-f]{16}", "", " ".join(shown[1].split()))
    assert expected in re.sub(r": [0-9a-f]{16} and [0-9a-f]{16}", "", " ".join(output.split()))
    monkeypatch.chdir(two_runs)
    assert main(block("compare")) == 1


def test_the_page_lists_every_option_with_its_default() -> None:
    from disttrain.commands.verify import verify_parser

    for action in verify_parser()._actions:
        if action.option_strings and action.dest != "help":
            (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{action.option_strings[0]}")]
            default = action.default
            if isinstance(default, list):
                assert f"`{','.join(map(str, default))}`" in row
            elif default:
                assert f"`{default}`" in row
