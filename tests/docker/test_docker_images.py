"""The images, without a container engine: rules for each Dockerfile, and a run of the CPU image's commands here.

These tests cannot show that the base images exist, or that a built image starts in a container.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("cpu", "cuda", "tpu")

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Return the (instruction, arguments) pairs of a Dockerfile, without comments and with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, arguments = line.partition(" ")
        pairs.append((word.upper(), arguments.strip()))
    return pairs


def stages(text: str) -> list[list[Instruction]]:
    by_stage: list[list[Instruction]] = []
    for word, arguments in instructions(text):
        if word == "FROM":
            by_stage.append([])
        assert by_stage, f"{word} before the first FROM"
        by_stage[-1].append((word, arguments))
    return by_stage


def only(stage: list[Instruction], wanted: str) -> str:
    values = [arguments for word, arguments in stage if word == wanted]
    assert len(values) == 1, f"expected one {wanted}, got {values}"
    return values[0]


def environment(stage: list[Instruction]) -> dict[str, str]:
    pairs = [pair for word, arguments in stage if word == "ENV" for pair in shlex.split(arguments)]
    return dict(pair.split("=", 1) for pair in pairs)


def complaints(text: str) -> list[str]:
    """Return the rules that a Dockerfile breaks, each as a sentence."""
    broken = []
    *building, final = stages(text)
    for stage in (*building, final):
        base = only(stage, "FROM").split(" ")[0]
        if not re.fullmatch(r"[a-z0-9/]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base):
            broken.append(f"the base {base} is not pinned to a whole version of an image without a host")
        for word, arguments in stage:
            if word == "ADD":
                broken.append("ADD fetches and unpacks; use COPY")
            if word == "RUN" and re.search(r"(curl|wget)\b|\|\s*(ba)?sh\b|\bsudo\b|apt(-get)? ", arguments):
                broken.append(f"RUN {arguments}: the download is not pinned")
            if word == "RUN" and "pip install" in arguments and "--constraint" not in arguments:
                broken.append(f"RUN {arguments}: packages are not pinned")
            if "://" in arguments:
                broken.append(f"{word} {arguments}: names a host")
            if re.search(r"(?i)(password|secret|token|api_?key)", arguments):
                broken.append(f"{word} {arguments}: looks like a secret")
    words = [word for word, _ in final]
    if words.count("USER") != 1 or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", only(final, "USER")):
        broken.append("expected one USER by numbers, not root: Kubernetes checks runAsNonRoot by its number")
    elif words.index("USER") < max((i for i, word in enumerate(words) if word == "RUN"), default=-1):
        broken.append("RUN after USER")
    if words.count("STOPSIGNAL") != 1 or only(final, "STOPSIGNAL") != "SIGTERM":
        broken.append("expected STOPSIGNAL SIGTERM, which the launcher answers with a checkpoint")
    if words.count("ENTRYPOINT") != 1 or not only(final, "ENTRYPOINT").startswith("["):
        broken.append("expected one ENTRYPOINT in exec form: a shell would not pass the signal on")
    elif json.loads(only(final, "ENTRYPOINT"))[1:] != ["-m", "disttrain.launch"]:
        broken.append("expected the launcher as ENTRYPOINT")
    if not building:
        broken.append("expected a separate build stage: the image must not contain the build's tools")
    return broken


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_keeps_the_rules(image: str) -> None:
    assert complaints((ROOT / "docker" / image / "Dockerfile").read_text()) == []


def test_every_image_is_tested() -> None:
    assert {path.parent.name for path in ROOT.glob("docker/*/Dockerfile")} == set(IMAGES)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("FROM python:3.11.13-slim-bookworm\n", "FROM python:3.11\n", "not pinned"),
        ("FROM python:3.11.13-slim-bookworm\n", "FROM registry.example/python:3.11.13\n", "not pinned"),
        ("USER 1000:1000\n", "", "not root"),
        ("USER 1000:1000\n", "USER root\n", "not root"),
        ("USER 1000:1000\n", "USER 1000:1000\nRUN true\n", "RUN after USER"),
        ("STOPSIGNAL SIGTERM\n", "STOPSIGNAL SIGKILL\n", "STOPSIGNAL SIGTERM"),
        ('["/opt/disttrain/bin/python", "-m", "disttrain.launch"]', "python -m disttrain.launch", "exec form"),
        ('"disttrain.launch"]', '"disttrain"]', "the launcher"),
        ("COPY examples", "ADD examples", "use COPY"),
        ("RUN python -m venv", "RUN curl x | sh && python -m venv", "is not pinned"),
        ("--constraint constraints.txt ", "", "packages are not pinned"),
        ("ARG PIP_INDEX_URL", "ARG PIP_INDEX_URL=https://example.org", "names a host"),
        ("ARG PIP_INDEX_URL", "ARG TOKEN=x", "secret"),
    ],
)
def test_each_rule_finds_a_planted_violation(old: str, new: str, complaint: str) -> None:
    good = (ROOT / "docker/cpu/Dockerfile").read_text()
    assert old in good
    assert any(complaint in broken for broken in complaints(good.replace(old, new)))


@pytest.mark.parametrize("image", IMAGES)
def test_the_copied_files_are_in_the_context(image: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for stage in stages((ROOT / "docker" / image / "Dockerfile").read_text()):
        for word, arguments in stage:
            if word == "COPY" and not arguments.startswith("--from="):
                *sources, _ = shlex.split(arguments)
                assert set(sources) <= let_in
                assert all((ROOT / source).exists() for source in sources)


def test_the_tpu_image_has_the_torch_that_torch_xla_needs() -> None:
    pinned = (ROOT / "constraints-xla.txt").read_text()
    run = (ROOT / "docker/tpu/Dockerfile").read_text()
    for package in ("torch", "torch-xla"):
        assert re.search(rf"(?m)^{package}==2\.9\.0$", pinned)
    assert "'torch_xla[tpu]==2.9.0'" in run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a folder that stands for / in the paths of the CPU image's Dockerfile."""
    for folder in ("build", "opt", "job"):
        (tmp_path / folder).mkdir()
    return tmp_path


def run(command: str | list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_cpu_image_install_and_train(root: Path) -> None:
    """Run its COPY, RUN and ENTRYPOINT in order, with each path below another root, in a new virtual environment."""
    building, final = stages((ROOT / "docker/cpu/Dockerfile").read_text())

    def moved(text: str) -> str:
        return re.sub(r"(?<![\w./])/(build|opt|job)\b", rf"{root}/\1", text)

    def play(stage: list[Instruction], env: dict[str, str]) -> Path:
        cwd = root
        for word, arguments in stage:
            if word == "WORKDIR":
                cwd = Path(moved(arguments))
            if word == "COPY" and not arguments.startswith("--from="):
                *sources, target = shlex.split(moved(arguments))
                for source in sources:
                    copy = cwd / target if len(sources) == 1 and target != "./" else cwd / target / source
                    (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, copy)
            if word == "RUN":
                run(moved(arguments).replace("-o 1000 -g 1000 ", "" if os.geteuid() else "-o 1000 -g 1000 "), cwd, env)
        return cwd

    # The stage's pip has this machine's configuration and keeps its cache; only in the image a cache is useless.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    variables["PATH"] = f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}"
    play(building, variables)
    job = play(final, variables)

    env = {name: moved(value.replace("$PATH", variables["PATH"])) for name, value in environment(final).items()}
    entry = [moved(word) for word in json.loads(only(final, "ENTRYPOINT"))]
    assert "fields of a Config" in run([*entry, *json.loads(only(final, "CMD"))], job, env)
    arguments = [str(root / "opt/disttrain/examples/digits.py"), "max_epochs=1"]
    output = run([*entry, *arguments], job, env)
    assert "completed" in output
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", *entry[1:], *arguments, "name=two"]
    run([str(root / "opt/disttrain/bin" / torchrun[0]), *torchrun[1:]], job, env)
    results = [json.loads((job / "runs" / name / "result.json").read_text()) for name in ("digits", "two")]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert Path(run([entry[0], "-c", "import disttrain; print(disttrain.__file__)"], job, env)).is_relative_to(root)
