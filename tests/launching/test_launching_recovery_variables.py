"""The variables of recovery in place: what an agent sets is what a rank reads."""

from hypothesis import given
from hypothesis import strategies as st

from disttrain.launching.recovery_variables import Recovery, read_recovery

WORDS = st.text("abc:/.-[]0189", min_size=1)


@given(WORDS, st.integers(1, 65535), WORDS, WORDS, st.floats(1, 3600))
def test_a_rank_reads_what_its_agent_sets(host: str, port: int, prefix: str, member: str, silence_s: float) -> None:
    where = Recovery(host, port, prefix, member, silence_s)
    assert read_recovery({**where.variables(), "PATH": "/bin"}) == where


def test_without_a_launcher_that_recovers_there_is_nothing_to_read() -> None:
    assert read_recovery({"RANK": "0", "WORLD_SIZE": "2"}) is None
