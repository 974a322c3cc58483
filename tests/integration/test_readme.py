"""All commands and code of README.md run, and its quoted files are the files of the repository."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, result

README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"(?ms)^```{re.escape(kind)}\n(.*?)^```$", README)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as in a shell with this environment activated."""
    words = shlex.split(line)
    scripts = {name: str(Path(sys.executable).with_name(name)) for name in ("torchrun", "disttrain")}
    words[0] = {"python": sys.executable, **scripts}[words[0]]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )


def test_the_config_is_the_example() -> None:
    assert blocks("python file=examples/digits.py") == [(ROOT / "examples/digits.py").read_text()]


def test_the_commands_run(checkout: Path) -> None:
    outputs = []
    for block in blocks("bash run"):
        for line in block.splitlines():
            # Without a new interpreter for each life, which tests/integration/test_verify.py tries.
            done = typed(f"{line} --quick" if " verify " in line else line, checkout)
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout)
    assert "is completed" in outputs[2]
    assert "the same bits in all 5 runs" in outputs[3]
    assert result(checkout / "runs/three")["world_size"] == 3
    assert result(checkout / "runs/other")["step"] == 2 * (1437 // 96)


def test_the_library_example_runs(tmp_path: Path) -> None:
    (code,) = blocks("python run")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert re.search(r"epoch 2 took \d+\.\d\d s", done.stdout)


def test_make_knows_the_commands() -> None:
    for line in blocks("bash"):
        words = line.split()
        assert words[0] == "make"
        planned = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert planned.returncode == 0, planned.stderr
        assert {"demo": "disttrain.launch examples/digits.py", "test": "pytest"}[words[1]] in planned.stdout


def test_every_link_has_its_target() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
