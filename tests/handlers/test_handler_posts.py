"""Progress that is posted, to a real HTTPS server that checks what Kubeflow Trainer's checks."""

import json
import re
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from disttrain.engine import Engine
from disttrain.handlers.losses import Pace
from disttrain.handlers.posts import ProgressPosts
from disttrain.pod import ProgressServer

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))  # small_run.py

x509 = pytest.importorskip(
    "cryptography.x509", reason="it makes the server's certificate: pip install 'disttrain[test]'"
)
models = pytest.importorskip("kubeflow_trainer_api.models", reason="Kubeflow's models: pip install 'disttrain[test]'")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from small_run import trained  # noqa: E402

PACE = Pace(step=3, epoch=1, loss=0.125, learning_rate=0.1, samples_per_second=9.0, values={"hits": 0.5, "no": [1.0]})


class Server:
    """An HTTPS server; `posted` holds the bodies in the order of their arrival."""

    def __init__(self, folder: Path) -> None:
        self.posted: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.status = 200
        self.token = folder / "token"
        self.token.write_text("first\n")
        self.cert = folder / "ca.crt"
        handler = type(
            "Handler",
            (BaseHTTPRequestHandler,),
            {"do_POST": lambda request: self.take(request), "log_message": lambda *_: None},
        )
        self.http = HTTPServer(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, write_certificate(self.cert, folder / "key.pem"))
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def take(self, request: Any) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        assert request.headers["Content-Type"] == "application/json"
        self.tokens.append(request.headers["Authorization"])
        self.posted.append(json.loads(body))
        request.send_response(self.status)
        request.end_headers()

    @property
    def address(self) -> ProgressServer:
        return ProgressServer(f"https://localhost:{self.http.server_port}/status", self.cert, self.token)


def write_certificate(cert: Path, key: Path) -> Path:
    """Write a certificate of localhost that certifies itself; return the path of its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    built = built.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    cert.write_bytes(built.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(private.private_bytes(*plain))
    return key


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.http.shutdown()
    running.http.server_close()


def run(posts: ProgressPosts, steps: int = 10, wait_s: float = 0.0) -> None:
    trainer = Engine(lambda engine, batch: time.sleep(wait_s))
    posts.attach(trainer)
    trainer.run(range(steps), max_epochs=1)
    posts.close()
    posts.close()


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_the_last_progress_is_posted_in_the_operators_form(server: Server) -> None:
    posts = ProgressPosts(server.address, 10, refuse, every_s=0.0)
    posts.pace(PACE)
    posts.validated({"loss": 0.25, "accuracy": 1, "per class": [0.5], "n" * 70: 0.5})
    run(posts, wait_s=0.02)
    for body in server.posted:
        assert models.TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(body).to_dict()["trainerStatus"]["metrics"]
    last = server.posted[-1]["trainerStatus"]
    assert last["progressPercentage"] == 100
    assert last["estimatedRemainingSeconds"] == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", last["lastUpdatedTime"])
    values = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert values == {"loss": "0.125", "hits": "0.5", "valid.loss": "0.25", "valid.accuracy": "1"}
    percents = [body["trainerStatus"]["progressPercentage"] for body in server.posted]
    assert percents == sorted(percents)


def test_it_posts_seldom_and_reads_the_token_anew(server: Server) -> None:
    posts = ProgressPosts(server.address, 100, refuse, every_s=60)
    trainer = Engine(lambda engine, batch: None)
    posts.attach(trainer)
    trainer.run(range(50), max_epochs=1)
    deadline = time.monotonic() + 10
    while not server.posted:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.token.write_text("second\n")
    posts.close()
    assert server.tokens == ["Bearer first", "Bearer second"]
    assert server.posted[-1]["trainerStatus"]["progressPercentage"] == 50


def test_a_run_posts_where_the_operator_has_set_an_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatched = trained(tmp_path / "unwatched")
    for name, value in server.address._asdict().items():
        monkeypatch.setenv(f"KUBEFLOW_TRAINER_SERVER_{name.upper()}", str(value))
    result = trained(tmp_path / "watched")
    assert result["params_sha256"] == unwatched["params_sha256"]
    last = server.posted[-1]["trainerStatus"]
    assert last["progressPercentage"] == 100
    values = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert values["valid.loss"] == str(result["metrics"]["loss"])


@pytest.mark.parametrize("how", ["refused", "stranger", "no token", "nobody"])
def test_what_cannot_be_posted_is_said_once_and_the_run_goes_on(server: Server, tmp_path: Path, how: str) -> None:
    address = server.address
    if how == "refused":
        server.status = 403
    if how == "stranger":  # whose certificate nobody has signed
        write_certificate(tmp_path / "other.crt", tmp_path / "other.pem")
        address = address._replace(ca_cert=tmp_path / "other.crt")
    if how == "no token":
        server.token.unlink()
    if how == "nobody":
        address = address._replace(url="https://localhost:9/status")
    told: list[str] = []
    run(ProgressPosts(address, 10, told.append, every_s=0.0), wait_s=0.02)
    assert len(told) == 1, told
    assert told[0].startswith(f"cannot post the progress to {address.url}: ")
    assert (how == "refused") == bool(server.posted)
