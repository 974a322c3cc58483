"""Ends, stops and leases of processes, on processes of this test's own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from disttrain.launching.process_watch import LEASE, Lease, stopped, wait_for_an_end

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open and /proc are Linux's")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_end_of_a_process_ends_the_wait(sleeper: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    wait_for_an_end([os.getpid(), sleeper.pid], 0.1)
    assert time.monotonic() - began >= 0.1
    threading.Timer(0.1, sleeper.kill).start()
    wait_for_an_end([os.getpid(), sleeper.pid], 60.0)
    sleeper.wait()
    wait_for_an_end([sleeper.pid], 60.0)  # one that has ended and is gone
    assert time.monotonic() - began < 30.0


def test_a_process_that_a_signal_has_stopped_is_named(sleeper: subprocess.Popen[bytes]) -> None:
    pids = [os.getpid(), sleeper.pid]
    assert stopped(pids) == []
    sleeper.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30.0
    while stopped(pids) != [sleeper.pid]:
        assert time.monotonic() < deadline
    sleeper.send_signal(signal.SIGCONT)
    while stopped(pids):
        assert time.monotonic() < deadline
    sleeper.kill()
    sleeper.wait()
    assert stopped(pids) == []


def test_a_lease_that_nobody_renews_expires_once_and_a_suspended_one_never() -> None:
    expired = threading.Event()
    lease = Lease(1.0, expired.set)
    time.sleep(1.0 * LEASE)
    assert not expired.is_set()  # it was never renewed: nothing had begun
    lease.renew()
    lease.suspend()
    time.sleep(1.0)
    assert not expired.is_set()
    lease.renew()
    assert expired.wait(30.0)
