"""Runs with checkpoints in a bucket of an S3 server on this machine: killed, resumed, in several parts, refused."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import kill, launch, result, start, write_cfg

pytest.importorskip("moto", reason="the S3 server is not installed: pip install 'disttrain[test]'")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'disttrain[test]'")

SMALLEST_PART = 5 * 2**20
"""S3 takes no smaller part, but for the last one; s3fs cuts at 50 MB unless it is told."""

# 800,000 parameters, with AdamW's states 9.6 MB: two parts. Steps of 0.1 s leave time for a kill.
LARGE = """
import time
from disttrain.engine import Events
def net():
    return nn.Sequential(nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 920), nn.ReLU(), nn.Linear(920, 10))
def slow(trainer, run):
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(0.1))
fields.update(model=net, handlers=[slow] if SLOW else [], max_epochs=3,
    checkpoint={"every_steps": 3, "target": TARGET, "asynchronous": ASYNCHRONOUS})
"""

# The process dies before the last part of its second checkpoint.
DIES = """
import os, signal
from s3fs.core import S3File
send, parts = S3File._upload_chunk, []
def die_at_the_fourth(file, final=False):
    parts.append(file)
    if len(parts) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return send(file, final)
S3File._upload_chunk = die_at_the_fourth
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an empty bucket; this process and those that it starts reach it by the usual variables."""
    variables = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "of-nobody",
        "AWS_SECRET_ACCESS_KEY": "of-nobody",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3_DEFAULT_BLOCK_SIZE": str(SMALLEST_PART),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = re.sub("[^a-z]+", "-", request.node.name.lower())[:40].strip("-")
    files = filesystem(server)
    files.mkdir(name)
    yield name
    files.rm(name, recursive=True)


def filesystem(server: str) -> Any:
    return s3fs.S3FileSystem(key="of-nobody", secret="of-nobody", endpoint_url=server, skip_instance_cache=True)


def write_large(folder: Path, target: str, *, slow: bool = False, asynchronous: bool = False, change: str = "") -> None:
    write_cfg(folder, f"SLOW, TARGET, ASYNCHRONOUS = {slow}, {target!r}, {asynchronous}\n{LARGE}{change}")


def steps_in(server: str, bucket: str) -> list[int]:
    """Return the steps whose checkpoints are committed in the bucket."""
    found = filesystem(server).glob(f"{bucket}/runs/small/step-*/MANIFEST.json")
    return sorted(int(path.split("/")[-2].removeprefix("step-").partition(".")[0]) for path in found)


def open_uploads(server: str, bucket: str) -> list[Any]:
    """Return the uploads in several parts that were begun and neither completed nor given up."""
    return filesystem(server).call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the run that nobody interrupts, whose checkpoints are on the disk."""
    folder = tmp_path_factory.mktemp("whole")
    write_large(folder, "kept")
    done = launch("cfg.py", cwd=folder)
    assert done.code == 0, done.text
    return str(result(folder / "runs/small")["params_sha256"])


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["between saves", "with asynchronous saves"])
def test_a_killed_run_resumes_from_the_bucket_on_other_ranks_with_the_same_bits(
    server: str, bucket: str, whole: str, tmp_path: Path, asynchronous: bool
) -> None:
    write_large(tmp_path, f"s3://{bucket}/runs", slow=True, asynchronous=asynchronous)
    process = start("cfg.py", cwd=tmp_path)
    deadline = time.monotonic() + 90
    while not steps_in(server, bucket):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
    kill(process)
    resume_elsewhere(server, bucket, whole, tmp_path, asynchronous=asynchronous)


def test_a_run_that_is_killed_between_two_parts_of_an_upload_resumes_from_the_checkpoint_before(
    server: str, bucket: str, whole: str, tmp_path: Path
) -> None:
    write_large(tmp_path, f"s3://{bucket}/runs", change=DIES)
    assert launch("cfg.py", cwd=tmp_path).code == -9
    assert steps_in(server, bucket) == [3]
    assert len(open_uploads(server, bucket)) == 1
    resume_elsewhere(server, bucket, whole, tmp_path)
    assert len(open_uploads(server, bucket)) == 1  # the bucket's own rule removes it (docs/checkpoints.md)


def resume_elsewhere(server: str, bucket: str, whole: str, folder: Path, *, asynchronous: bool = False) -> None:
    """Resume on 2 ranks without the run directory, and compare the weights with those of the whole run."""
    saved = steps_in(server, bucket)
    os.rename(folder / "runs", folder / "lost")  # as a machine that went with its disk
    write_large(folder, f"s3://{bucket}/runs", asynchronous=asynchronous)
    done = launch("cfg.py", ranks=2, cwd=folder)
    assert done.code == 0, done.text
    assert f"resuming from step {saved[-1]}" in done.out
    assert result(folder / "runs/small")["params_sha256"] == whole
    assert not list((folder / "runs/small/checkpoints").glob("step-*"))


def test_files_are_uploaded_in_several_parts_and_no_upload_is_left_open(
    server: str, bucket: str, whole: str, tmp_path: Path
) -> None:
    write_large(tmp_path, f"s3://{bucket}/runs")
    assert launch("cfg.py", cwd=tmp_path).code == 0
    files = filesystem(server)
    tensors = files.find(f"{bucket}/runs/small", detail=True)
    large = [info for path, info in tensors.items() if path.endswith(".safetensors")]
    assert large
    for info in large:
        assert info["size"] > SMALLEST_PART
        assert info["ETag"].strip('"').partition("-")[2] == "2", info  # S3's mark of a file in two parts
    assert open_uploads(server, bucket) == []


def test_a_bucket_that_is_not_there_is_one_line_and_is_not_made(server: str, bucket: str, tmp_path: Path) -> None:
    write_large(tmp_path, "s3://no-such-bucket/runs")
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    assert done.code == 1
    assert done.err.count("Error: ") == 1, done.err
    assert "cannot reach the checkpoints in s3://no-such-bucket/runs/small: " in done.err
    assert not filesystem(server).exists("no-such-bucket")
