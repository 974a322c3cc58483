"""The pod that this process runs in, as Kubernetes and its operators see it: why it ended, and where progress goes.

*Contract*: both are optional, and neither ever fails a run. Kubernetes shows the text that a container leaves in its
termination log. Kubeflow Trainer takes the progress of a TrainJob at an address that it sets in each pod.

*Environment*: this file reads their variables.

*Source*: Kubernetes, "Determine the Reason for Pod Failure"; Kubeflow Trainer, "TrainJob Progress and Training
Metrics".
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TERMINATION_LOG = "DISTTRAIN_TERMINATION_LOG"
"""The variable that names the termination log; the manifests of launch/kubernetes set it."""
_MAX_BYTES = 4096
"""Kubernetes shows no more of a termination log."""


class ProgressServer(NamedTuple):
    """The address that takes progress, the file of its certificate, and the file of the token, which is renewed."""

    url: str
    ca_cert: Path
    token: Path


def progress_server(environ: Mapping[str, str] = os.environ) -> ProgressServer | None:
    """Return where progress is to be posted; None unless Kubeflow Trainer has set all of its variables."""
    url, ca_cert, token = (environ.get(f"KUBEFLOW_TRAINER_SERVER_{name}") for name in ("URL", "CA_CERT", "TOKEN"))
    return ProgressServer(url, Path(ca_cert), Path(token)) if url and ca_cert and token else None


def note_end(text: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write why this process ends into the termination log, if there is one; the last text counts.

    The file is a mount, so it is written in place.
    """
    if path := environ.get(TERMINATION_LOG):
        data = text.encode(errors="replace")
        with contextlib.suppress(OSError):
            Path(path).write_bytes(data if len(data) <= _MAX_BYTES else data[: _MAX_BYTES - 4] + b" ...")
