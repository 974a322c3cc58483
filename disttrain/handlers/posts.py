"""Post the progress of a run where an operator of Kubernetes asks for it: percent, time left, loss and metrics.

*Contract*: rank 0 alone posts, in a thread of its own, and the training never waits for it but at its end, for at most
`TIMEOUT_S`. What cannot be posted is said once, and the run goes on. Nothing of the run depends on it.

*Source*: Kubeflow Trainer, "TrainJob Progress and Training Metrics": one post in 5 s at most; the token is read anew
for each, because it is renewed.
"""

import math
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.request import Request, urlopen

from disttrain.engine import Engine, Events
from disttrain.files import json_text
from disttrain.handlers.losses import Pace
from disttrain.pod import ProgressServer

POST_EVERY_S = 10.0
TIMEOUT_S = 5.0
MAX_METRICS, LONGEST_NAME, LARGEST_INT = 256, 64, 2**31 - 1
"""The operator would refuse more, and the progress with it."""


class ProgressPosts:
    """Posts how far a run of `total_steps` has come; `tell` shows why it could not."""

    def __init__(
        self, server: ProgressServer, total_steps: int, tell: Callable[[str], object], *, every_s: float = POST_EVERY_S
    ) -> None:
        self._server = server
        self._total_steps = total_steps
        self._tell = tell
        self._every_s = every_s
        self._metrics: dict[str, str] = {}
        self._reached = (0, 0.0)
        self._next_post = 0.0
        self._start = (0, 0.0)
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)

    def start(self, engine: Engine) -> None:
        """Start the thread, which posts where the run begins."""
        self._start = (engine.state.iteration, time.monotonic())
        self._thread = threading.Thread(target=self._post_until_ended, name="disttrain-posts", daemon=True)
        self._thread.start()
        self.step(engine)

    def pace(self, pace: Pace) -> None:
        """Store the newest loss, norm and values."""
        self._store("", {"loss": pace.loss, "grad_norm": pace.grad_norm, **pace.values})

    def validated(self, values: Mapping[str, Any]) -> None:
        """Store the results of an evaluation, each as `valid.NAME`."""
        self._store("valid.", values)

    def step(self, engine: Engine) -> None:
        """Post the progress if it is time."""
        now, step = time.monotonic(), engine.state.iteration
        self._reached = (step, now)
        if now >= self._next_post:
            self._next_post = now + self._every_s
            self._wake.set()

    def close(self) -> None:
        """Post the last progress and end the thread; may be called several times."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            self._wake.set()
            thread.join(TIMEOUT_S)

    def _store(self, prefix: str, values: Mapping[str, Any]) -> None:
        numbers = {f"{prefix}{name}": value for name, value in values.items()}
        fit = {name: str(value) for name, value in numbers.items() if isinstance(value, int | float)}
        fit = {name: value for name, value in fit.items() if len(name) <= LONGEST_NAME}
        self._metrics = {**self._metrics, **fit}  # a new dict: the thread may be reading the old one

    def _status(self) -> dict[str, Any]:
        (first_step, began), (step, now) = self._start, self._reached
        status: dict[str, Any] = {
            # 100 means that the run is over, so it is not rounded up.
            "progressPercentage": math.floor(100 * min(step, self._total_steps) / max(self._total_steps, 1)),
            "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "metrics": [{"name": name, "value": value} for name, value in [*self._metrics.items()][:MAX_METRICS]],
        }
        if step > first_step:
            left = max(self._total_steps - step, 0)
            left_s = (now - began) / (step - first_step) * left
            status["estimatedRemainingSeconds"] = min(round(left_s), LARGEST_INT)
        return status

    def _post_until_ended(self) -> None:
        has_told = False
        ended = False
        while not ended:
            self._wake.wait()
            self._wake.clear()
            ended = self._ended.is_set()
            try:
                self._post({"trainerStatus": self._status()})
            except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
                if not has_told:
                    self._tell(
                        f"cannot post the progress to {self._server.url}: {type(error).__name__}: {error}; "
                        "the run goes on, and later failures are not shown"
                    )
                has_told = True

    def _post(self, body: dict[str, Any]) -> None:
        token = self._server.token.read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = Request(self._server.url, json_text(body).encode(), headers, method="POST")
        context = ssl.create_default_context(cafile=str(self._server.ca_cert))
        with urlopen(request, timeout=TIMEOUT_S, context=context) as response:
            response.read()
