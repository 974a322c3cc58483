"""The name `xla` is reserved: what it will be, and what works until then."""

from disttrain.errors import BackendError


def refuse_xla() -> BackendError:
    """Return the error for `connect("xla")`."""
    return BackendError(
        "expected a backend of this release, got 'xla', which comes with a later one; "
        "use 'nccl' on GPUs, 'gloo' on CPUs, 'single' for one process, or 'auto'"
    )
