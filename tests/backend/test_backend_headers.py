"""Headers: they carry their content, any difference between calls is found, and each rank raises the right error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.backend.headers import (
    HEADER_BYTES,
    ROOM_BYTES,
    Header,
    Status,
    compare_headers,
    decode_header,
    describe_value,
    encode_header,
    is_shared,
    mark_shared,
)
from disttrain.errors import BackendError, RemoteError

texts = st.text(max_size=400)


@given(texts, st.binary(max_size=2 * ROOM_BYTES), st.sampled_from(Status))
def test_a_header_has_one_length_and_keeps_what_fits(text: str, payload: bytes, status: Status) -> None:
    sent = encode_header(text, payload, status)
    assert (sent.dtype, sent.shape) == (torch.uint8, (HEADER_BYTES,))
    got = decode_header(sent)
    assert (got.status, got.payload, got.payload_bytes) == (status, payload[:ROOM_BYTES], len(payload))
    if len(text.encode(errors="backslashreplace")) <= 240:
        assert got.text == text.encode(errors="backslashreplace").decode()


@given(texts, texts)
def test_two_digests_differ_exactly_if_the_descriptions_do(one: str, other: str) -> None:
    assert (decode_header(encode_header(one)).digest == decode_header(encode_header(other)).digest) == (one == other)


def test_long_descriptions_that_differ_at_their_end_differ() -> None:
    headers = [decode_header(encode_header("agree(" + "x" * 1000 + end)) for end in "ab"]
    with pytest.raises(BackendError, match="expected the same call on every rank"):
        compare_headers(headers, None)


def header(text: str, status: Status = Status.OK, payload: bytes = b"") -> Header:
    return decode_header(encode_header(text, payload, status))


def test_ranks_that_called_the_same_are_named_together() -> None:
    with pytest.raises(BackendError, match=r"got ranks 0, 2: barrier\(\); rank 1: all_gather\(objects\); make"):
        compare_headers([header("barrier()"), header("all_gather(objects)"), header("barrier()")], None)


def test_a_failed_body_comes_before_a_mismatch_and_that_before_a_refusal() -> None:
    failed = [header("barrier()"), header("agree('x')", Status.FAILED, b"KeyError: 1")]
    with pytest.raises(RemoteError, match="rank 1 failed: KeyError: 1"):
        compare_headers(failed, None)
    own = KeyError(1)
    with pytest.raises(KeyError) as caught:
        compare_headers(failed, own)
    assert caught.value is own
    with pytest.raises(BackendError, match="same call"):
        compare_headers([header("barrier()"), header("all_reduce(str)", Status.REFUSED, b"TypeError: no")], None)
    with pytest.raises(RemoteError, match="rank 0 failed: TypeError: no"):
        compare_headers([header("gather", Status.REFUSED, b"TypeError: no"), header("gather")], None)


def test_equal_calls_raise_nothing() -> None:
    assert compare_headers([header("barrier()")] * 3, None) is None  # type: ignore[func-returns-value]


def test_an_error_that_a_shared_error_causes_is_shared() -> None:
    shared = mark_shared(ValueError("known"))
    assert is_shared(shared)
    assert not is_shared(ValueError("known"))
    with pytest.raises(RuntimeError) as caught:
        try:
            raise shared
        except ValueError as error:
            raise RuntimeError("wrapped") from error
    assert is_shared(caught.value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(3, 2), "float32[3, 2]"),
        (torch.tensor(1), "int64[]"),
        (True, "bool"),
        (1, "int"),
        (1.0, "float"),
        ("a", "str"),
        (None, "NoneType"),
    ],
)
def test_values_are_described_by_kind(value: object, kind: str) -> None:
    assert describe_value(value) == kind
