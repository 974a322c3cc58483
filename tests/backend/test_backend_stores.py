"""Stores of torch.distributed: opened at a free port, shared by connections, and ended with their object."""

import socket
import time

import pytest

from disttrain.backend.stores import connect_store, open_store


def test_one_connection_gets_the_value_that_another_sets() -> None:
    store = open_store(0, 10.0)
    assert store.port > 0
    first, second = connect_store("127.0.0.1", store.port, 10.0), connect_store("localhost", store.port, 10.0)
    first.set("key", "value")
    assert second.get("key") == store.get("key") == b"value"
    assert second.compare_set("key", "value", "other") == first.get("key") == b"other"


def test_a_port_in_use_is_an_error() -> None:
    store = open_store(0, 10.0)
    with pytest.raises(RuntimeError, match=str(store.port)):
        open_store(store.port, 10.0)


def test_no_answer_is_an_error_after_the_timeout() -> None:
    with socket.socket() as closed:  # bound, and not listening: no other process gets this port
        closed.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            connect_store("127.0.0.1", closed.getsockname()[1], 0.2)
    assert time.monotonic() - began >= 0.1


def test_a_store_ends_with_its_object() -> None:
    store = open_store(0, 10.0)
    connection = connect_store("127.0.0.1", store.port, 10.0)
    connection.set("key", "value")
    del store
    with pytest.raises(RuntimeError):
        connection.get("key")
