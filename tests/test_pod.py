"""The reason of the end in a pod's termination log, and the address at which its operator takes progress."""

from pathlib import Path

import pytest

from disttrain.pod import TERMINATION_LOG, ProgressServer, note_end, progress_server

SERVER = {f"KUBEFLOW_TRAINER_SERVER_{name}": f"/{name}" for name in ("URL", "CA_CERT", "TOKEN")}


def test_the_last_reason_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    inode = log.stat().st_ino
    for text in ("first, a long one", "ConfigError: red"):
        note_end(text, {TERMINATION_LOG: str(log)})
    assert log.read_text() == "ConfigError: red"
    assert log.stat().st_ino == inode  # a mount cannot be replaced
    note_end("é" * 4000, {TERMINATION_LOG: str(log)})
    assert len(log.read_bytes()) == 4096
    assert log.read_bytes().endswith(b" ...")


@pytest.mark.parametrize("environ", [{}, {TERMINATION_LOG: ""}, {TERMINATION_LOG: "/no/such/folder/log"}])
def test_without_a_log_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    note_end("text", environ)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/no/such").exists()


def test_the_operator_sets_all_three_variables() -> None:
    assert progress_server(SERVER) == ProgressServer("/URL", Path("/CA_CERT"), Path("/TOKEN"))
    for name in SERVER:
        assert progress_server({**SERVER, name: ""}) is None
    assert progress_server({}) is None
